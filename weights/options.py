"""Keys of a config.json: taken one by one, so that what nobody took is known in the end."""

from typing import Any


class Options:
    """The keys of a config.json that have not been read yet."""

    def __init__(self, raw: dict):
        self.left = dict(raw)

    def require(self, key: str) -> Any:
        """Take the value of a key. ValueError: it is missing or null."""
        if self.left.get(key) is None:
            raise ValueError(f"config.json has no {key}")
        return self.left.pop(key)

    def take(self, key: str, default: Any = None) -> Any:
        """Take the value of a key, or the default if the key is missing. null stays None."""
        return self.left.pop(key, default)

    def peek(self, key: str, default: Any) -> Any:
        """Return the value of a key that is one of IDLE_KEYS, and leave it there."""
        return self.left.get(key, default)


def translate(key: str, value: Any, known: dict) -> Any:
    """Return the entry of `known` for a value. ValueError: there is none."""
    if value not in known:
        raise ValueError(
            f"config.json: plumb does not know {key} = {value!r}: only {', '.join(known)}"
        )
    return known[value]


def agreed(values: dict[str, Any]) -> Any:
    """Return the one value that some keys give, None if all are null. ValueError: they differ."""
    given = {key: value for key, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        words = " and ".join(f"{key} = {value!r}" for key, value in given.items())
        raise ValueError(f"config.json: {words} say different things: remove the wrong one")
    return next(iter(given.values()), None)
