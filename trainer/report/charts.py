"""The curves of runs: loss, accuracies, learning rate, throughput, wait for images, skipped steps."""

from __future__ import annotations

from collections.abc import Sequence

from .curves import NUM_COLOURS, Line, line_chart
from .files import WEIGHTS, RunFiles

__all__ = ["charts"]

TESTS = {"top1": "top-1, %", "top5": "top-5, %"}
RECORDED = {
    "lr": "learning rate",
    "images_per_second": "images/s in training",
    "slowest_rank_data_seconds": "wait for images, s, slowest process",
    "skipped_steps": "skipped steps, in all",
}


def charts(runs: Sequence[RunFiles]) -> str:
    """Return the charts as HTML; one colour for each run, or for each line where there is one run."""
    num_epochs = max((record["epoch"] for run in runs for record in run.records), default=0)
    if not num_epochs:
        return "<p>No epoch has ended yet.</p>"
    terms = dict.fromkeys(name for run in runs for record in run.records for name in record.get("train", {}))
    drawn = [line_chart(f"loss, {term}", _term(runs, term), num_epochs=num_epochs) for term in terms]
    drawn += [line_chart(title, _tests(runs, key), num_epochs=num_epochs) for key, title in TESTS.items()]
    drawn += [line_chart(title, _recorded(runs, key), num_epochs=num_epochs) for key, title in RECORDED.items()]
    return f'<div class="charts">{"".join(drawn)}</div>'


def _term(runs: Sequence[RunFiles], term: str) -> list[Line]:
    return [
        Line(
            name=run.name if len(runs) > 1 else "mean of the epoch",
            points=[(record["epoch"], record["train"][term]) for record in run.records if term in record["train"]],
            colour=index % NUM_COLOURS,
        )
        for index, run in enumerate(runs)
    ]


def _tests(runs: Sequence[RunFiles], key: str) -> list[Line]:
    return [
        Line(
            name=f"{run.name}, {kind}" if len(runs) > 1 else f"{kind} weights",
            points=run.tests(weights, key),
            colour=(index if len(runs) > 1 else place) % NUM_COLOURS,
            is_dashed=len(runs) > 1 and weights == "net",
        )
        for index, run in enumerate(runs)
        for place, (weights, kind) in enumerate(WEIGHTS.items())
    ]


def _recorded(runs: Sequence[RunFiles], key: str) -> list[Line]:
    return [
        Line(
            name=run.name if len(runs) > 1 else "by epoch",
            points=[(record["epoch"], record[key]) for record in run.records if key in record],
            colour=index % NUM_COLOURS,
        )
        for index, run in enumerate(runs)
    ]
