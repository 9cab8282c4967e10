"""A store as torch's, in memory."""


class MemoryStore:
    """Values by key. gone: whether every operation fails, as with a connection that is lost."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.gone = False

    def set(self, key: str, value: str | bytes) -> None:
        self._look()
        self.values[key] = value if isinstance(value, bytes) else value.encode()

    def compare_set(self, key: str, expected: str, value: str) -> None:
        if self.values.get(key, b"") == expected.encode():
            self.set(key, value)

    def get(self, key: str) -> bytes:
        self._look()
        return self.values[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._look()
        return [self.values[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        self._look()
        return all(key in self.values for key in keys)

    def _look(self) -> None:
        if self.gone:
            raise RuntimeError("connection reset")
