"""Reading the value of one entry, and checking it against its annotation in ``configs.schema``.

An annotation is a scalar type or a union of these, ``Literal`` for a choice, one of the bounded numbers below, a list,
a ``Pair``, a dictionary of further arguments, a ``Node`` or a union of nodes told apart by their ``type``; each of them
optional with ``| None``.

A value is checked here and nowhere else: what builds a run from a configuration relies on it.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .tree import Node, nearest

__all__ = [
    "Count",
    "Decay",
    "NonNegative",
    "Pair",
    "PartialShare",
    "Positive",
    "PositiveCount",
    "PositiveShare",
    "Range",
    "Seed",
    "Share",
    "Side",
    "convert",
    "element_type",
    "entry_types",
    "is_group",
    "read_literal",
]

_NONE_WORDS = ("None", "none", "null")
_BOOL_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_KIND_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    dict: "a dictionary of names and values",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that an entry accepts.

    Attributes:
        at_least: Smallest number.
        above: Every number is above it.
        at_most: Largest number.
        below: Every number is below it.
        without: What None means for an optional entry, in messages.
    """

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    without: str = ""

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        limits = {">=": self.at_least, ">": self.above, "<=": self.at_most, "<": self.below}
        return " and ".join(f"{sign} {limit:g}" for sign, limit in limits.items() if math.isfinite(limit))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
    """The number of elements that a list has."""

    elements: int


T = TypeVar("T")

Count = Annotated[int, Range(at_least=0)]
PositiveCount = Annotated[int, Range(at_least=1)]
Side = Annotated[int, Range(at_least=32)]  # pixels; the smallest input of the network is 32
NonNegative = Annotated[float, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
PositiveShare = Annotated[float, Range(above=0, at_most=1)]
PartialShare = Annotated[float, Range(at_least=0, below=1)]
Decay = Annotated[float, Range(above=0, below=1, without="no average")]
Seed = Annotated[int, Range(at_least=0, at_most=4_000_000_000)]  # NumPy's limit is 2**32 - 1, and ranks are added
Pair = Annotated[list[T], Length(elements=2)]


def entry_types(kind: type[Node]) -> dict[str, Any]:
    """Return the annotation of every entry of a group, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(kind)}


def element_type(annotation: Any) -> Any:
    """Return the annotation of the elements of a list."""
    return get_args(_split(annotation)[0][0])[0]


def is_group(annotation: Any) -> bool:
    """Return whether the annotation is a node's, so that its entries are set one by one."""
    kind = _split(annotation)[0][0]
    return isinstance(kind, type) and issubclass(kind, Node)


def read_literal(text: str) -> Any:
    """Return the Python or JSON literal that ``text`` writes, or ``text`` itself where it writes none."""
    readers: tuple[Callable[[str], Any], ...] = (ast.literal_eval, json.loads)
    for reader in readers:
        try:
            return reader(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text


def convert(value: Any, annotation: Any, path: str) -> Any:
    """Return ``value`` as the annotation has it: a text read as a number or a list, a dictionary made into a node.

    Args:
        value: What a config file, a saved file or the command line gave.
        annotation: The annotation of the entry.
        path: The entry, as messages name it.

    Raises:
        ValueError: where the value has another type, is none of the choices or is out of range.
    """
    kinds, bounds, is_optional = _split(annotation)
    if is_optional and (value is None or (isinstance(value, str) and value in _NONE_WORDS)):
        return None
    if is_group(annotation):
        return _convert_node(value, kinds, path)
    if get_origin(kinds[0]) is list:
        return _convert_list(value, annotation, path)
    for kind in kinds:
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            return _convert_scalar(value, kind, bounds)
    raise ValueError(f"{path}={value!r}: expected {_describe(annotation)}{_hint(value, kinds[0])}")


def _split(annotation: Any) -> tuple[tuple[Any, ...], Any, bool]:
    """Return the kinds of value that an annotation allows, their `Range` or `Length`, and whether None is allowed."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = tuple(member for member in members if member is not NoneType)
    if get_origin(kinds[0]) is Annotated:
        kind, bounds = get_args(kinds[0])
        return (kind,), bounds, NoneType in members
    return kinds, None, NoneType in members


def _convert_scalar(value: Any, kind: Any, bounds: Range | None) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError
        return value
    if kind is bool:
        return value if isinstance(value, bool) else _BOOL_WORDS[str(value).lower()]
    if kind in (int, float):
        return _convert_number(value, kind, bounds)
    if get_origin(kind) is dict:
        value, kind = read_literal(value) if isinstance(value, str) else value, dict
    if kind is not Any and not isinstance(value, kind):
        raise TypeError
    if kind is dict and not all(isinstance(name, str) for name in value):
        raise TypeError
    return value


def _convert_number(value: Any, kind: type, bounds: Range | None) -> Any:
    number = read_literal(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise TypeError
    if kind(number) != number or (bounds is not None and number not in bounds):
        raise ValueError
    return kind(number)


def _convert_list(value: Any, annotation: Any, path: str) -> list[Any]:
    items = read_literal(value) if isinstance(value, str) else value
    length = _split(annotation)[1]
    if not isinstance(items, list | tuple) or (length is not None and len(items) != length.elements):
        raise ValueError(f"{path}={value!r}: expected {_describe(annotation)}")
    return [convert(item, element_type(annotation), f"{path}.{index}") for index, item in enumerate(items)]


def _convert_node(value: Any, kinds: tuple[type[Node], ...], path: str) -> Node:
    """Check a node in place, or make one out of a dictionary whose ``type`` chooses among ``kinds``."""
    if isinstance(value, kinds):
        for name, annotation in entry_types(type(value)).items():
            setattr(value, name, convert(getattr(value, name), annotation, _join(path, name)))
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{path}={value!r}: expected entries, {' or '.join(kind.__name__ for kind in kinds)}")
    kind = kinds[0] if len(kinds) == 1 else _kind_of(value, kinds, path)
    types = entry_types(kind)
    for name in value:
        if name not in types:
            entry, meant = _join(path, str(name)), _join(path, nearest(str(name), types))
            raise ValueError(f"{entry}: there is no such entry; did you mean {meant!r}?")
    for required in dataclasses.fields(kind):
        if required.name not in value and required.default is required.default_factory is dataclasses.MISSING:
            raise ValueError(f"{_join(path, required.name)}: {kind.__name__} needs this entry")
    return kind(**{name: convert(item, types[name], _join(path, name)) for name, item in value.items()})


def _kind_of(value: dict[str, Any], kinds: tuple[type[Node], ...], path: str) -> type[Node]:
    by_type = {get_args(entry_types(kind)["type"])[0]: kind for kind in kinds}
    name = str(value.get("type", ""))
    if name not in by_type:
        raise ValueError(f"{path}.type={name!r}: expected {_one_of(by_type)}; did you mean {nearest(name, by_type)!r}?")
    return by_type[name]


def _describe(annotation: Any) -> str:
    kinds, bounds, is_optional = _split(annotation)
    kind = kinds[0]
    if get_origin(kind) is Literal:
        words = _one_of(get_args(kind))
    elif get_origin(kind) is list:
        elements = f" of {bounds.elements}" if bounds else ""
        return f"a list{elements}, each {_describe(element_type(annotation))}" + (", or None" if is_optional else "")
    elif is_group(annotation):
        words = " or ".join(kind.__name__ for kind in kinds)
    else:
        words = " or ".join(_KIND_WORDS[get_origin(kind) or kind] for kind in kinds)
    none = f"None for {bounds.without}" if bounds and bounds.without else "None"
    return words + (f" {bounds}" if bounds else "") + (f", or {none}" if is_optional else "")


def _one_of(choices: Any) -> str:
    names = ", ".join(repr(choice) for choice in choices)
    return f"one of {names}" if len(choices) > 1 else names


def _hint(value: Any, kind: Any) -> str:
    if get_origin(kind) is Literal and len(get_args(kind)) > 1 and value:
        return f"; did you mean {nearest(str(value), get_args(kind))!r}?"
    return ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
