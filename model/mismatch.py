"""Comparison of a checkpoint's entries with a network's, and a readable report where they differ.

A report counts by module, since one wrong variant makes hundreds of entries differ at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .messages import listed

__all__ = ["LoadReport", "Variants", "compare", "explain"]

Variants = Callable[[], Mapping[str, Mapping[str, Sequence[int]]]]  # variant -> entry -> shape

CLOSE = 0.5  # share of equal entries from which a file is said to look like a variant
MAX_GROUPS = 8
NAMES_PER_GROUP = 2


@dataclass(frozen=True)
class LoadReport:
    """The result of a load.

    Attributes:
        source: Which weights of the file were taken: ``net``, ``net_E``, ..., or ``bare``.
        missing: Entries of the network that the file lacks.
        unexpected: Entries of the file that the network lacks.
        mismatched: Entries of both, of different shapes.
        reset: Entries of a head of another class count, left as the network had them.
    """

    source: str
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    reset: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the file's entries are exactly the network's, apart from reset heads."""
        return not (self.missing or self.unexpected or self.mismatched)


def compare(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], *, source: str, reset_heads: Sequence[str] = ()
) -> LoadReport:
    """Compare names and shapes.

    Args:
        weights: The file's entries.
        own: The network's entries.
        source: Where in the file the weights stood.
        reset_heads: Names of heads that the network keeps as they are where their shape differs.
    """
    mismatched = [entry for entry in own if entry in weights and weights[entry].shape != own[entry].shape]
    changed = [head for head in reset_heads if any(entry.startswith(f"{head}.") for entry in mismatched)]
    reset = [entry for entry in own if entry.startswith(tuple(f"{head}." for head in changed))]
    return LoadReport(
        source=source,
        missing=tuple(entry for entry in own if entry not in weights and entry not in reset),
        unexpected=tuple(entry for entry in weights if entry not in own),
        mismatched=tuple(entry for entry in mismatched if entry not in reset),
        reset=tuple(reset),
    )


def explain(
    report: LoadReport,
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    heads: Sequence[str],
    variants: Variants | None = None,
    entry: str = "model.name",
) -> list[str]:
    """Return sentences on what does not fit, the likely reason, and the way out.

    Args:
        report: What `compare` found.
        weights: The file's entries.
        own: The network's entries.
        heads: Names of the classifiers.
        variants: Returns the shapes of each known variant's entries.
        entry: Where a configuration names the variant.
    """
    return [
        *_describe(report, weights, own),
        *_head_hints(report, weights, own, heads),
        *_variant_hint(weights, own, heads, variants, entry),
    ]


def _describe(report: LoadReport, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterable[str]:
    if report.missing:
        yield f"{len(report.missing)} missing from the file: {_grouped(report.missing)}."
    if report.unexpected:
        yield f"{len(report.unexpected)} unexpected in the file: {_grouped(report.unexpected)}."
    if report.mismatched:
        shapes = {entry: f"{entry} {_shape(weights[entry])} for {_shape(own[entry])}" for entry in report.mismatched}
        groups = _grouped(report.mismatched, shapes)
        yield f"{len(report.mismatched)} of another shape, the file's for the network's: {groups}."


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _grouped(entries: Iterable[str], texts: Mapping[str, str] | None = None) -> str:
    """Count entries by their first module, with the first few names of each."""
    groups: dict[str, list[str]] = {}
    for entry in entries:
        groups.setdefault(entry.partition(".")[0], []).append(texts[entry] if texts else entry)
    shown = []
    for prefix, members in list(groups.items())[:MAX_GROUPS]:
        shown.append(f"{prefix} {len(members)} ({listed(members, NAMES_PER_GROUP)})")
    if len(groups) > MAX_GROUPS:
        shown.append(f"and {len(groups) - MAX_GROUPS} modules more")
    return "; ".join(shown)


def _head_hints(
    report: LoadReport, weights: Mapping[str, Tensor], own: Mapping[str, Tensor], heads: Sequence[str]
) -> Iterable[str]:
    for head in heads:
        entry = f"{head}.weight"
        if entry in report.mismatched and weights[entry].shape[:1] != own[entry].shape[:1]:
            classes = weights[entry].shape[0]
            yield (
                f"{head} has {classes} classes in the file and {own[entry].shape[0]} in the network: set "
                f"model.model_kwargs.num_classes={classes}, or fine-tune with -m ft, which starts a new head."
            )


def _variant_hint(
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    heads: Sequence[str],
    variants: Variants | None,
    entry: str,
) -> Iterable[str]:
    """Guess whose weights these are, by the share of entries of the same name and shape."""
    if variants is None:
        return
    ignored = tuple(f"{head}." for head in heads)

    def comparable(shapes: Mapping[str, Sequence[int]]) -> set[tuple[str, tuple[int, ...]]]:
        # A scalar has the same shape in every variant, and a head follows the class count.
        counted = (entry for entry, shape in shapes.items() if len(shape) and not entry.startswith(ignored))
        return {(entry, tuple(shapes[entry])) for entry in counted}

    found = comparable({entry: value.shape for entry, value in weights.items()})

    def likeness(shapes: Mapping[str, Sequence[int]]) -> float:
        known = comparable(shapes)
        return len(found & known) / max(len(found | known), 1)

    scores = {variant: likeness(shapes) for variant, shapes in variants().items()}
    best = max(scores.values(), default=0.0)
    present = likeness({entry: value.shape for entry, value in own.items()})
    if best >= CLOSE and best > present:
        closest = [variant for variant, score in scores.items() if score == best]
        yield f"The file looks like {' or '.join(closest)}: set {entry}={closest[0]}."
    elif max(best, present) < CLOSE:
        yield f"The file looks like none of {', '.join(scores)}: it holds another network's weights."
