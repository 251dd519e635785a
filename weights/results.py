"""Published figures against measured ones, and the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from model.zoo import Entry

__all__ = ["FAIL", "NOT_JUDGED", "PASS", "Figure", "Result", "judge"]

PASS = "pass"  # the word, no password # nosec B105
FAIL = "FAIL"
NOT_JUDGED = "not judged"

DECIMALS = 6  # beyond these, a difference is the floating point's


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure of one checkpoint.

    Attributes:
        name: Such as ``top1``.
        measured: In points.
        published: In points.
        also_known: Other values that its authors got from the same weights.
        in_table: The published table's value; None where it is not known apart from the figure.
        verdict: `PASS` where the measured value lies within the tolerance of a known one, else `FAIL`; `NOT_JUDGED`
            where the two cannot be compared.
    """

    name: str
    measured: float
    published: float
    also_known: Sequence[float]
    in_table: float | None
    verdict: str

    @property
    def difference(self) -> float:
        """Points from the nearest known value to the measured one."""
        return round(min((self.measured - known for known in (self.published, *self.also_known)), key=abs), DECIMALS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The measurements of one checkpoint.

    Attributes:
        name: The checkpoint.
        weights: Which weights of its file.
        config: What they were tested with.
        overrides: Overrides of it, but for the paths.
        checkpoint: The file.
        dataset: What it was measured on.
        fingerprint: That data set's hash, where there is one.
        num_images: Images that were counted.
        seconds: That it took, reading the images included.
        tolerance: In points.
        figures: By the order in which they are published.
        doubts: Why the figures are not judged; empty where they are.
    """

    name: str
    weights: str
    config: str
    overrides: Sequence[str]
    checkpoint: str
    dataset: str
    fingerprint: str
    num_images: int
    seconds: float
    tolerance: float
    figures: Sequence[Figure]
    doubts: Sequence[str] = field(default=())

    @property
    def verdict(self) -> str:
        """The worst of the figures' verdicts."""
        verdicts = {figure.verdict for figure in self.figures}
        return next(verdict for verdict in (FAIL, NOT_JUDGED, PASS) if verdict in verdicts)

    @property
    def images_per_second(self) -> float:
        """Images a second, over all processes."""
        return self.num_images / max(self.seconds, 1e-9)


def judge(entry: Entry, measured: Mapping[str, float], *, tolerance: float, is_comparable: bool) -> tuple[Figure, ...]:
    """Return the published figures of a checkpoint with the measured ones.

    Args:
        entry: The checkpoint.
        measured: In points, by the names under which they are published.
        tolerance: In points.
        is_comparable: Whether both are of the same images.
    """
    figures = []
    for name, published in entry.published.items():
        known = (published, *entry.also_known.get(name, ()))
        is_near = any(round(abs(measured[name] - value), DECIMALS) <= tolerance for value in known)
        figures.append(
            Figure(
                name=name,
                measured=measured[name],
                published=published,
                also_known=known[1:],
                in_table=entry.in_table.get(name),
                verdict=(PASS if is_near else FAIL) if is_comparable else NOT_JUDGED,
            )
        )
    return tuple(figures)
