"""A run's page: one HTML file with curves, configuration and mistakes, of one run or of several side by side.

It needs no network and runs no script: its policy forbids both, whatever the names in it hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from model.files import replacing
from util.logging import duration

from .charts import charts
from .files import WEIGHTS, RunFiles, read_run
from .mistake_tables import mistake_tables
from .settings import settings
from .style import STYLE
from .tables import Cell, table

__all__ = ["page_path", "render", "write_page"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page_path(folder: Path) -> Path:
    """Return the place of a run's page in its folder."""
    return folder / "report.html"


def write_page(path: Path, folders: Sequence[Path]) -> None:
    """Write the page of the runs in these folders; the file appears only when it is whole.

    Raises:
        ValueError: If a folder is not a run's.
        OSError: If the page cannot be written.
    """
    text = render([read_run(folder) for folder in folders])
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def render(runs: Sequence[RunFiles]) -> str:
    """Return the page of one or more runs as HTML."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = [
        ("Overview", _overview(runs)),
        ("Curves", charts(runs)),
        *((f"Mistakes of {run.name}" if len(runs) > 1 else "Mistakes", mistake_tables(run)) for run in runs),
        ("Configuration", settings(runs)),
    ]
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections if content)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>{body}</main></body></html>\n"
    )


def _overview(runs: Sequence[RunFiles]) -> str:
    """Return a table with a column for each run."""
    rows = [
        ["network", *(str(run.config.get("model.name", "?")) for run in runs)],
        ["epochs", *map(_progress, runs)],
        *([f"best top-1, {kind} weights", *(_best(run, name) for run in runs)] for name, kind in WEIGHTS.items()),
        ["images/s, last epoch", *(_last(run, "images_per_second", "{:,.1f}") for run in runs)],
        ["time", *(duration(_number(run, "total_seconds")) for run in runs)],
        ["skipped steps", *(_last(run, "skipped_steps", "{:,}") for run in runs)],
        ["unreadable images", *(_last(run, "unreadable", "{:,}") for run in runs)],
    ]
    header = ["", *(run.name for run in runs)] if len(runs) > 1 else []
    return table(header, [[Cell(row[0], is_header=True), *row[1:]] for row in rows])


def _progress(run: RunFiles) -> str:
    done = run.records[-1]["epoch"] if run.records else 0
    full = run.config.get("epoch_full")
    return f"{done}" if full is None else f"{done} of {full}"


def _best(run: RunFiles, weights: str) -> str:
    best = run.best(weights)
    return "-" if best is None else f"{best[1]:.2f} % in epoch {best[0]}"


def _last(run: RunFiles, key: str, form: str) -> str:
    return form.format(run.records[-1][key]) if run.records and key in run.records[-1] else "-"


def _number(run: RunFiles, key: str) -> float:
    return float(run.records[-1].get(key, 0)) if run.records else 0.0
