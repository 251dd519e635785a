"""``path.key=value`` arguments, read by the annotations of ``configs.schema`` and written into the tree.

An element of a list goes by its index, or by its type or name where that is unique::

    data.train_transforms.0.color_jitter=0.2
    loss.loss_terms.KD.tau=2
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from .schema import Config
from .tree import Node, nearest
from .values import convert, element_type, entry_types, is_group, read_literal

__all__ = ["apply_overrides", "get_entry", "set_entry"]

_NOT_OVERRIDDEN = {"mode": "give it with -m", "derived": "it is written by configs.resolve"}


class _Entry(NamedTuple):
    owner: Any
    key: Any
    annotation: Any
    path: str


def apply_overrides(config: Config, overrides: Sequence[str]) -> set[str]:
    """Write the overrides into ``config`` in their order, and return the paths of the entries that they set.

    Raises:
        ValueError: for an argument without ``=``, an entry that does not exist or a value that it does not accept.
    """
    given = set()
    for argument in overrides:
        path, separator, text = argument.partition("=")
        if not separator or not path:
            raise ValueError(f"{argument!r} is not an option, nor an override such as size=192 (path.key=value)")
        entry = _find(config, path)
        _write(entry, text)
        given.add(entry.path)
    return given


def get_entry(config: Config, path: str) -> Any:
    """Return the value at ``path``."""
    return _read(*_find(config, path)[:2])


def set_entry(config: Config, path: str, value: Any) -> None:
    """Set the entry at ``path``.

    Raises:
        ValueError: where there is no such entry, or the value does not fit it.
    """
    entry = _find(config, path)
    setattr(entry.owner, entry.key, convert(value, entry.annotation, path))


def _write(entry: _Entry, text: str) -> None:
    if entry.path in _NOT_OVERRIDDEN:
        raise ValueError(f"{entry.path} cannot be overridden: {_NOT_OVERRIDDEN[entry.path]}")
    if is_group(entry.annotation):
        example = next(_paths(_read(entry.owner, entry.key), entry.path))
        raise ValueError(f"{entry.path}={text}: {entry.path} is a group; override its entries, such as {example}")
    # Inside a dictionary the schema says nothing of the types.
    value = read_literal(text) if entry.annotation is Any else convert(text, entry.annotation, entry.path)
    if isinstance(entry.owner, Node):
        setattr(entry.owner, entry.key, value)
    else:
        entry.owner[entry.key] = value


def _find(config: Config, path: str) -> _Entry:
    entry = _Entry({"": config}, "", type(config), "")
    try:
        for name in path.split("."):
            entry = _step(_read(entry.owner, entry.key), name, entry)
    except KeyError:
        raise ValueError(f"{path}: there is no such entry; did you mean {_meant(config, path)!r}?") from None
    return entry


def _meant(config: Config, path: str) -> str:
    """Return the existing path nearest to ``path``, where possible one that ends in the same name."""
    last = path.rpartition(".")[2]
    paths = list(_paths(config))
    return nearest(path, [known for known in paths if known.rpartition(".")[2] == last] or paths)


def _step(node: Any, name: str, parent: _Entry) -> _Entry:
    """Return the entry ``name`` inside ``node``, the value of ``parent``."""
    path = f"{parent.path}.{name}" if parent.path else name
    if isinstance(node, Node):
        return _Entry(node, name, entry_types(type(node))[name], path)
    if isinstance(node, list):
        index = int(name) if name.isdecimal() else _index_of(node, name)
        if index >= len(node):
            raise KeyError(name)
        annotation = Any if parent.annotation is Any else element_type(parent.annotation)
        return _Entry(node, index, annotation, f"{parent.path}.{index}")
    if isinstance(node, dict) and name:
        return _Entry(node, name, Any, path)
    raise KeyError(name)


def _index_of(elements: list[Any], name: str) -> int:
    """Return the index of the only element with this type or name."""
    matches = [
        index
        for index, element in enumerate(elements)
        if name in (getattr(element, "type", None), getattr(element, "name", None))
    ]
    if len(matches) != 1:
        raise KeyError(name)
    return matches[0]


def _read(owner: Any, key: Any) -> Any:
    return getattr(owner, key) if isinstance(owner, Node) else owner[key]


def _paths(value: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every entry inside ``value``, groups after what they hold."""
    if isinstance(value, Node):
        children = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    elif isinstance(value, list):
        children = {str(index): element for index, element in enumerate(value)}
    else:
        children = {}
    for name, child in children.items():
        yield from _paths(child, f"{path}.{name}" if path else name)
    if path:
        yield path
