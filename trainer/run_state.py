"""How far a run is, and what it has reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .evaluate import Score

__all__ = ["RunState"]


@dataclass(kw_only=True, slots=True)
class RunState:
    """Counters of a run; part of every checkpoint.

    Attributes:
        epoch: Epochs done.
        step: Optimiser steps done in the epoch that is not.
        iteration: Optimiser steps done altogether, those that were skipped among them.
        seconds: Time spent.
        bad_steps: Steps skipped in a row, for reasons other than the loss scale.
        skipped_steps: Steps skipped altogether.
        unreadable: Training images that could not be read.
        scores: One record per test: ``epoch``, counted from 1, and per weights (net, net_E) the counts.
    """

    epoch: int = 0
    step: int = 0
    iteration: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    skipped_steps: int = 0
    unreadable: list[str] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)

    def add_scores(self, epoch: int, scores: Mapping[str, Score]) -> list[str]:
        """Record a test.

        Args:
            epoch: Counted from 1.
            scores: By weights.

        Returns:
            The weights that are better than ever, by top-1.
        """
        previous = {name: self.best(name) for name in scores}
        self.scores.append({"epoch": epoch, **{name: asdict(score) for name, score in scores.items()}})
        return [name for name, score in scores.items() if previous[name] is None or score.top1 > previous[name][1].top1]

    def best(self, name: str) -> tuple[int, Score] | None:
        """Return the epoch, counted from 1, and the score of the best test of these weights; the first of equals."""
        records = [(record["epoch"], Score(**record[name])) for record in self.scores if name in record]
        return max(records, key=lambda record: record[1].top1, default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RunState:
        """Return the state that ``state_dict`` told of."""
        return cls(**{item.name: state[item.name] for item in fields(cls)})
