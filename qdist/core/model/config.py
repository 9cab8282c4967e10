"""Reads a config.json with typed keys."""

from collections.abc import Mapping

from qdist.core.errors import ModelError

_PUBLISHED = "its published config.json"


class Keys:
    """Typed look-ups in a config. A key may have several spellings, of which an error names the first."""

    def __init__(self, config: Mapping[str, object], name: str) -> None:
        self._config, self.name = config, name

    def count(self, *spellings: str, default: int | None = None, most: int = 10**8) -> int:
        """A count; `most` is more than any model has."""
        value = self._first(spellings, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self._wrong(spellings[0], value, f"a whole number from 1 to {most:,}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._first((key,), default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        return str(self._first((key,), default))

    def _wrong(self, key: str, value: object, wanted: str) -> ModelError:
        shown = repr(value) if len(repr(value)) < 40 else f"{repr(value)[:36]}..."
        return ModelError(f"{self.name}: config.json has {key} = {shown}; it must be {wanted}", try_=_PUBLISHED)

    def states(self, key: str) -> bool:
        return self._config.get(key) is not None

    def divides(self, parts: str, count: int, whole: str, size: int) -> None:
        """Raise ModelError where a size of the configuration is not a multiple of another."""
        if size % count:
            raise ModelError(
                f"{self.name}: config.json has {whole} = {size}, which is not a multiple of {parts} = {count}",
                try_=_PUBLISHED,
            )

    def _first(self, spellings: tuple[str, ...], default: object) -> object:
        value = next((self._config[key] for key in spellings if self._config.get(key) is not None), default)
        if value is None:
            raise ModelError(f"{self.name}: config.json has no {spellings[0]}", try_=_PUBLISHED)
        return value
