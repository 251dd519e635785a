"""The configuration of runs: what differs from the published recipe and between the runs, and all of it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .files import RunFiles, recipe_of
from .tables import Cell, table

__all__ = ["settings"]

ABSENT = object()


def settings(runs: Sequence[RunFiles]) -> str:
    """Return the tables as HTML; a value that is not the recipe's is marked."""
    if not any(run.config for run in runs):
        return ""
    name, recipe, derived = recipe_of(runs[0])
    paths = list(dict.fromkeys([*recipe, *(path for run in runs for path in run.config)]))
    rows = {path: _row(path, recipe, runs) for path in paths}
    follows = derived.intersection(*(run.derived for run in runs))
    different = [
        rows[path]
        for path in paths
        if path not in follows and any(isinstance(cell, Cell) and cell.is_changed for cell in rows[path])
    ]
    header = ["entry", "recipe", *([run.name for run in runs] if len(runs) > 1 else ["this run"])]
    text = f"What differs from {name}. Entries that follow from others are in the full list only."
    if not different:
        text = f"Nothing differs from {name}."
    return (
        f"<p>{escape(text)}</p>{table(header, different, kind='settings') if different else ''}"
        f"<details><summary>All {len(paths)} entries</summary>{table(header, list(rows.values()), kind='settings')}"
        "</details>"
    )


def _row(path: str, recipe: dict[str, Any], runs: Sequence[RunFiles]) -> list[Cell | str]:
    expected = recipe.get(path, ABSENT)
    values = [run.config.get(path, ABSENT) for run in runs]
    cells = [Cell(_shown(value), is_changed=value != expected) for value in values]
    return [Cell(path, is_header=True), _shown(expected), *cells]


def _shown(value: Any) -> str:
    return "-" if value is ABSENT else str(value) if value != "" else '""'
