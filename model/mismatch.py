"""Comparison of a checkpoint's entries with a network's, and a readable report where they differ.

A report counts by module, since one wrong variant makes hundreds of entries differ at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .messages import listed

__all__ = ["LoadReport", "Variants", "compare", "explain", "head_modules", "is_folded_file"]

Variants = Callable[[], Mapping[str, Mapping[str, Sequence[int]]]]  # variant -> entry -> shape

CLOSE = 0.5  # share of equal entries from which a file is said to look like a variant
FOLDED_STEM = "patch_embed.weights.0"  # an entry that only a folded network has
INSIDE_MODEL = "backbone."  # before the entries of a backbone inside a detector or segmentor
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
        reset: Entries of a head of another class count, or that the file lacks, left as the network had them.
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
        reset_heads: Names of heads that the network keeps as they are where their shape differs or the file has none.
    """
    mismatched = [entry for entry in own if entry in weights and weights[entry].shape != own[entry].shape]
    changed = [head for head in reset_heads if any(entry.startswith(f"{head}.") for entry in mismatched)]
    absent = [head for head in reset_heads if not any(entry.startswith(f"{head}.") for entry in weights)]
    reset = [entry for entry in own if entry.startswith(tuple(f"{head}." for head in changed))]
    reset += [entry for entry in own if entry not in weights and entry.startswith(head_modules(absent))]
    return LoadReport(
        source=source,
        missing=tuple(entry for entry in own if entry not in weights and entry not in reset),
        unexpected=tuple(entry for entry in weights if entry not in own),
        mismatched=tuple(entry for entry in mismatched if entry not in reset),
        reset=tuple(reset),
    )


def head_modules(heads: Iterable[str]) -> tuple[str, ...]:
    """Return how the entries of the classifiers' modules start, with those of a normalisation before the classifier."""
    return tuple(f"{head.partition('.')[0]}." for head in heads)


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
        *(_kind_hint(weights, own) or _variant_hint(weights, own, heads, variants, entry)),
    ]


def is_folded_file(weights: Iterable[str]) -> bool:
    """Return whether entries are those of a network after `fuse`, inside another model or not."""
    return any(entry.removeprefix(INSIDE_MODEL) == FOLDED_STEM for entry in weights)


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


def _kind_hint(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Tell a folded network and a whole detector or segmentor, whose names say so."""
    if is_folded_file(weights) and not is_folded_file(own):
        return ["The file holds a folded network, which cannot be unfolded: name the weights of before fuse()."]
    if is_folded_file(own) and not is_folded_file(weights):
        return ["The network is folded, the file is not: load the weights first, then fuse()."]
    if _has_backbone(weights) and not _has_backbone(own):
        return [
            f"The file holds a detector, segmentor or the like, with its backbone under {INSIDE_MODEL!r}: take the "
            "backbone out with `python -m model.convert FILE BACKBONE.pth --to release`."
        ]
    return []


def _has_backbone(entries: Iterable[str]) -> bool:
    return any(entry.startswith(INSIDE_MODEL) for entry in entries)


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
    absent = [head for head in heads if f"{head}.weight" in report.missing]
    if absent:
        yield f"The file has no classifier {' or '.join(absent)}: fine-tune with -m ft, which starts a new head."


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
    known = {variant: _comparable(shapes, heads) for variant, shapes in variants().items()}
    found, present = (_comparable({key: value.shape for key, value in part.items()}, heads) for part in (weights, own))
    closest, closest_own = _closest(found, known), _closest(present, known)
    if not closest and _likeness(found, present) < CLOSE:
        yield f"The file looks like none of {', '.join(known)}: it holds another network's weights."
    elif not closest or _likeness(found, present) >= _likeness(found, known[closest[0]]):
        return
    elif set(closest) & set(closest_own):
        yield f"The file looks like {' or '.join(closest)}, and so does the network: give the arguments of the file's."
    else:
        yield f"The file looks like {' or '.join(closest)}: set {entry}={closest[0]}."


_Entries = set[tuple[str, tuple[int, ...]]]


def _comparable(shapes: Mapping[str, Sequence[int]], heads: Sequence[str]) -> _Entries:
    # A scalar has the same shape in every variant, and a head follows the class count.
    ignored = tuple(f"{head}." for head in heads)
    return {(key, tuple(shape)) for key, shape in shapes.items() if len(shape) and not key.startswith(ignored)}


def _likeness(found: _Entries, known: _Entries) -> float:
    return len(found & known) / max(len(found | known), 1)


def _closest(found: _Entries, known: Mapping[str, _Entries]) -> list[str]:
    """Return the variants that entries are closest to, none where they are far from all."""
    scores = {variant: _likeness(found, entries) for variant, entries in known.items()}
    best = max(scores.values(), default=0.0)
    return [variant for variant, score in scores.items() if score == best >= CLOSE]
