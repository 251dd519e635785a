"""The report of a check: a table on screen, the same in Markdown, and everything in JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from util.logging import markdown_table, table

from .results import FAIL, Figure, Result

__all__ = ["notes", "screen", "write"]

HEADER = ("checkpoint", "weights", "figure", "published", "measured", "difference", "verdict", "images", "images/s")
ROUNDING = 0.05  # a table of one decimal says no more than this


def screen(results: Sequence[Result]) -> str:
    """Return the table, and notes on single checkpoints below it."""
    return "\n".join([table(HEADER, _rows(results)), *notes(results)])


def write(folder: Path, results: Sequence[Result], *, errors: Sequence[str], run: dict[str, Any]) -> None:
    """Write ``check.md`` and ``check.json``.

    Args:
        folder: Where to.
        results: What was measured.
        errors: What could not be measured, and why.
        run: Facts of the run.
    """
    text = markdown_table(HEADER, _rows(results), is_right=[False, *[True] * (len(HEADER) - 1)])
    said = [f"- {line}" for line in (*notes(results), *errors)]
    (folder / "check.md").write_text("\n".join([text, "", *said]).rstrip() + "\n", encoding="utf-8")
    contents = {**run, "results": [_plain(result) for result in results], "errors": list(errors)}
    (folder / "check.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def notes(results: Sequence[Result]) -> list[str]:
    """Return notes on what the table cannot show."""
    lines = []
    for result in results:
        title = f"{result.name} ({result.weights})"
        if result.doubts:
            lines.append(f"{title} is not judged: {'; '.join(result.doubts)}")
        for figure in result.figures:
            if figure.in_table is not None and abs(figure.in_table - figure.published) > ROUNDING + 1e-9:
                difference = figure.measured - figure.in_table
                lines.append(
                    f"{title}: the published table gives {figure.name} {figure.in_table:g} ({difference:+.3f} to it), "
                    f"the log of the release {figure.published:.3f}, which is what counts here"
                )
        if result.verdict == FAIL:
            lines.append(f"{title}: a figure lies further than {result.tolerance:g} points from the published one")
    return lines


def _rows(results: Sequence[Result]) -> list[list[str]]:
    return [
        [
            result.name,
            result.weights,
            figure.name,
            _published(figure),
            f"{figure.measured:.3f}",
            f"{figure.difference:+.3f}",
            figure.verdict,
            str(result.num_images),
            f"{result.images_per_second:.1f}",
        ]
        for result in results
        for figure in result.figures
    ]


def _published(figure: Figure) -> str:
    return " or ".join(f"{value:.3f}" for value in (figure.published, *figure.also_known))


def _plain(result: Result) -> dict[str, Any]:
    figures = [{**asdict(figure), "difference": figure.difference} for figure in result.figures]
    added = {"figures": figures, "verdict": result.verdict, "images_per_second": result.images_per_second}
    return {**asdict(result), **added}
