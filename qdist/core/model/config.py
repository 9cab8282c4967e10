"""Reads a config.json with typed keys."""

from collections.abc import Mapping, Sequence

from qdist.core.errors import ModelError

_PUBLISHED = "its published config.json"


class Keys:
    """Typed look-ups in a config. A key may have several spellings, of which an error names the first."""

    def __init__(self, config: Mapping[str, object], name: str) -> None:
        self._config, self.name = config, name

    def inner(self, key: str) -> "Keys":
        """The keys of a configuration within this one; none where it is absent."""
        value = self._config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return Keys(value or {}, self.name)

    def over(self, defaults: Mapping[str, object]) -> "Keys":
        """The same keys, with a value for those that are absent."""
        return Keys({**defaults, **self._config}, self.name)

    def count(self, *spellings: str, default: int | None = None, least: int = 1, most: int = 10**8) -> int:
        """A count; `most` is more than any model has."""
        value = self._first(spellings, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self._wrong(spellings[0], value, f"a whole number from {least} to {most:,}")
        return value

    def counts(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; empty where it is absent."""
        value = self._first((key,), ())
        if not isinstance(value, Sequence) or not all(isinstance(each, int) for each in value):
            raise self._wrong(key, value, "a list of whole numbers")
        return tuple(value)

    def texts(self, key: str, *, default: Sequence[str], length: int) -> tuple[str, ...]:
        """A list of words, one for each of the first `length` layers."""
        value = self._first((key,), tuple(default))
        if not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value) or len(value) < length:
            raise self._wrong(key, value, f"a list of {length} words")
        return tuple(value[:length])

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

    def is_list(self, key: str) -> bool:
        return isinstance(self._config.get(key), list | tuple)

    def is_null(self, key: str) -> bool:
        """Whether the config says that there is none, which an absent key does not."""
        return key in self._config and self._config[key] is None

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
