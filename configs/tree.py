"""Nodes of the configuration tree: open while a configuration is put together, read-only once it is resolved."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

__all__ = ["Node", "freeze", "nearest", "to_dict"]


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the one of ``names`` that ``name`` most likely meant."""
    by_lower = {candidate.lower(): candidate for candidate in names}
    return by_lower[difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)[0]]


@dataclasses.dataclass
class Node:
    """A group of entries; its subclasses are dataclasses with slots.

    Raises:
        AttributeError: on assignment to a name that is no entry, or to any entry once the tree is read-only.
    """

    __slots__ = ("_is_frozen",)

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self)
        if getattr(self, "_is_frozen", False):
            raise AttributeError(
                f"{kind.__name__}.{name} cannot be assigned: a resolved configuration is read-only; "
                "set the entry in the config file or by a path.key=value override"
            )
        if not hasattr(kind, name):
            known = [entry.name for entry in dataclasses.fields(self)]
            raise AttributeError(f"{kind.__name__} has no entry {name!r}; did you mean {nearest(name, known)!r}?")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be deleted")


class _ReadOnlyDict(dict[str, Any]):
    """A dictionary that can be read, copied and pickled, but not changed."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a resolved configuration is read-only; copy it with dict(...) first")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return type(self), (dict(self),)


def freeze(value: Any) -> Any:
    """Return ``value`` read-only: nodes refuse assignment, lists become tuples, dictionaries refuse changes."""
    if isinstance(value, Node):
        for entry in dataclasses.fields(value):
            object.__setattr__(value, entry.name, freeze(getattr(value, entry.name)))
        object.__setattr__(value, "_is_frozen", True)
        return value
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    if isinstance(value, dict):
        return _ReadOnlyDict({key: freeze(item) for key, item in value.items()})
    return value


def to_dict(value: Any) -> Any:
    """Return a configuration, or a part of it, as dictionaries, lists and scalars only."""
    if isinstance(value, Node):
        return {entry.name: to_dict(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return value
