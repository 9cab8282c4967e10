"""Which connections does the server keep? None that is silent, that reads nothing, or that is one too many."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 512
PATIENCE_S = 20.0
"""Seconds after which an idle connection is closed, at most twice as many; also one whose request never is whole."""
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    b"Retry-After: 5\r\nConnection: close\r\n\r\n"
    b'{"error":{"message":"the server has too many connections; try: again in 5 s",'
    b'"type":"service_unavailable_error","param":null,"code":"connections"}}'
)


class Connection(H11Protocol):
    """A connection of uvicorn's that is looked at from time to time."""

    patience_s = PATIENCE_S
    most = MOST_CONNECTIONS

    def connection_made(self, transport: Any) -> None:
        """Begin to look at it, or close it at once."""
        super().connection_made(transport)
        self._seen: Any = None
        self._unsent = 0
        self._look: asyncio.TimerHandle | None = None
        if len(self.connections) > self.most:
            transport.write(_FULL)
            transport.close()
        else:
            self._look_again()

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more."""
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP; uvicorn 0.54 would fail where an answer is on its way."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def _look_again(self) -> None:
        self._look = self.loop.call_later(self.patience_s, self._close_if_idle)

    def _close_if_idle(self) -> None:
        """Close it if there was no request since the last look, or nothing of an answer was read."""
        busy = self.cycle is not None and not self.cycle.response_complete
        unsent = self.transport.get_write_buffer_size()
        stuck = unsent and unsent == self._unsent
        if stuck:
            self.transport.abort()
        elif not busy and self.cycle is self._seen and not unsent:
            self.transport.close()
        else:
            self._seen, self._unsent = self.cycle, unsent
            self._look_again()
