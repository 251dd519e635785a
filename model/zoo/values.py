"""Checks of what a list of checkpoints says: types of its values, and paths that stay inside their folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PureWindowsPath
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

__all__ = ["check_path", "describe", "fits"]

WORDS = {str: "a text", int: "a whole number from 0", float: "a finite number", NoneType: "null"}


def fits(value: Any, wanted: Any) -> bool:
    """Return whether a value of a JSON file has an annotated type; whole numbers are counts, so from 0."""
    kind, inner = get_origin(wanted) or wanted, get_args(wanted)
    if kind in (Union, UnionType):
        return any(fits(value, option) for option in inner)
    if kind is Mapping:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    if kind is Sequence:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and abs(value) < math.inf
    return isinstance(value, kind) and (kind is not int or value >= 0)


def describe(wanted: Any) -> str:
    """Return an annotated type in words."""
    kind, inner = get_origin(wanted) or wanted, get_args(wanted)
    if kind in (Union, UnionType):
        return " or ".join(map(describe, inner))
    if kind is Mapping:
        return f"an object, each of its values {describe(inner[1])}"
    if kind is Sequence:
        return f"a list, each element {describe(inner[0])}"
    return WORDS.get(kind) or f"the name of a {kind.__name__.lower()}"


def check_path(text: str, *, key: str, is_name: bool = False) -> None:
    """Refuse a path that is absolute or leads upwards, by the rules of any system, so that nothing is written outside.

    Args:
        text: The path.
        key: What it is, for messages.
        is_name: Whether it has to be a single name.

    Raises:
        ValueError: If it is such a path, is empty, or has control characters.
    """
    path = PureWindowsPath(text)  # knows "/" too, and drives
    is_inside = bool(path.parts) and not path.anchor and ".." not in path.parts and text.isprintable()
    if not is_inside or (is_name and len(path.parts) > 1):
        kind = "a name without a folder" if is_name else "a relative path without '..'"
        raise ValueError(f"{key} {text!r} is refused: expected {kind}")
