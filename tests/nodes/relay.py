"""A switch that holds every packet for a while: `relay.py SECONDS PORT PORT ...`, in the namespace of the ports.

Packets are taken as the kernel has them: up to 64 KiB of a stream at once, with what is still to be done to them in
a header of 10 bytes before each. So Python keeps up with a network of 1 Gbit/s.
"""

import collections
import os
import select
import socket
import sys
import time

_PACKET, _VNET_HEADER, _IGNORE_OUTGOING = 263, 15, 23
_HEADER, _LARGEST, _SOCKET_BYTES = 10, 1 << 17, 16 << 20
_EVERYTHING = 3


def main() -> None:
    """Carry packets until the namespace ends."""
    delay, ports = float(sys.argv[1]), [_opened(name) for name in sys.argv[2:]]
    where: dict[bytes, socket.socket] = {}
    held: collections.deque[tuple[float, bytes, socket.socket]] = collections.deque()
    os.setpriority(os.PRIO_PROCESS, 0, -15)
    print("ready", flush=True)
    while True:
        wait = max(held[0][0] - time.monotonic(), 0) if held else None
        for port in select.select(ports, (), (), wait)[0]:
            for packet in _received(port):
                where[packet[_HEADER + 6 : _HEADER + 12]] = port
                held.append((time.monotonic() + delay, packet, port))
        now = time.monotonic()
        while held and held[0][0] <= now:
            _, packet, port = held.popleft()
            known = where.get(packet[_HEADER : _HEADER + 6])
            for to in [known] if known else [other for other in ports if other is not port]:
                _send(to, packet)


def _opened(name: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setsockopt(_PACKET, _VNET_HEADER, 1)
    port.setsockopt(_PACKET, _IGNORE_OUTGOING, 1)
    for option in (33, 32):  # SO_RCVBUFFORCE, SO_SNDBUFFORCE
        port.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
    port.bind((name, _EVERYTHING))
    port.setblocking(False)
    return port


def _received(port: socket.socket) -> list[bytes]:
    """What has come in, of a burst at most 64 packets."""
    packets = []
    for _ in range(64):
        try:
            packets.append(port.recv(_LARGEST))
        except (BlockingIOError, OSError):  # a link that is down
            break
    return packets


def _send(port: socket.socket, packet: bytes) -> None:
    """A port that is full or down drops it, as a switch does."""
    try:
        port.send(packet)
    except OSError:
        return


if __name__ == "__main__":
    main()
