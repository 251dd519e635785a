"""The values in log lines: per iteration, averaged or summed, over all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .distributed import Process

__all__ = ["Meter", "Meters", "Reading", "Term"]


class Term(Protocol):
    """How one value is shown; ``configs.schema.LogTerm`` is one."""

    name: str
    fmt: str  # a format spec, with or without a leading colon
    show_name: str  # val | avg | sum
    add_name: str  # the same, in brackets; '' for none


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The state of a meter, over all processes."""

    val: float
    avg: float
    sum: float


class Meter:
    """The last value, the weighted sum and the total weight since the last reset.

    A value may be a tensor on a GPU: it is read only when the meter is, so that nothing waits for the GPU.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self._value: float | torch.Tensor = 0.0
        self._sum: float | torch.Tensor = 0.0
        self.count = 0.0

    def update(self, value: float | torch.Tensor, count: float = 1.0) -> None:
        """Add a value with the weight ``count``."""
        self._value = value.detach().double() if isinstance(value, torch.Tensor) else value
        self._sum = self._sum + self._value * count
        self.count += count

    def state(self) -> list[float]:
        """Return value, sum and count as numbers."""
        return [float(self._value), float(self._sum), self.count]

    def load_state(self, state: Sequence[float]) -> None:
        """Restore what ``state`` returned."""
        self._value, self._sum, self.count = state


class Meters:
    """One meter per term; values without a term are not shown and are dropped.

    Args:
        terms: What is shown, in this order.

    Raises:
        ValueError: If a term's format is not one.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        for term in terms:
            _check(term)
        self.terms = list(terms)
        self._meters = {term.name: Meter() for term in terms}

    def update(self, values: Mapping[str, float | torch.Tensor], count: float = 1.0) -> None:
        """Add one value for each name, each with the weight ``count``."""
        for name, value in values.items():
            if name in self._meters:
                self._meters[name].update(value, count)

    def reset(self) -> None:
        """Start over."""
        for meter in self._meters.values():
            meter.reset()

    def read(self, process: Process) -> dict[str, Reading]:
        """Return the readings over all processes, of the meters that hold anything; a collective."""
        flat = process.sum([number for meter in self._meters.values() for number in meter.state()])
        readings = {}
        for index, name in enumerate(self._meters):
            value, total, count = flat[3 * index : 3 * index + 3]
            if count > 0:
                readings[name] = Reading(val=value / process.world_size, avg=total / count, sum=total)
        return readings

    def columns(self, readings: Mapping[str, Reading]) -> str:
        """Return the readings as columns of a log line: ``[lr 0.000009] [CE 6.980 (6.990)]``."""
        return " ".join(_column(term, readings[term.name]) for term in self.terms if term.name in readings)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the meters of this process as numbers."""
        return {name: meter.state() for name, meter in self._meters.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Restore what ``state_dict`` returned; unknown names are left out."""
        for name, numbers in state.items():
            if name in self._meters:
                self._meters[name].load_state(numbers)


def _check(term: Term) -> None:
    try:
        format(0.0, term.fmt.lstrip(":"))
    except ValueError:
        raise ValueError(f"logging term {term.name!r} has format {term.fmt!r}, expected one like ':>5.3f'") from None


def _column(term: Term, reading: Reading) -> str:
    spec = term.fmt.lstrip(":")
    text = f"{term.name} {getattr(reading, term.show_name):{spec}}"
    if term.add_name:
        text += f" ({getattr(reading, term.add_name):{spec}})"
    return f"[{text}]"
