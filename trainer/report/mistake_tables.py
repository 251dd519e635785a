"""The mistakes of a run's best epoch as HTML: worst classes, confusions, and the most confident ones with pictures."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from html import escape
from typing import Any

from .files import WEIGHTS, RunFiles
from .tables import Cell, table

__all__ = ["mistake_tables"]

MAX_MATRIX = 20  # classes of which the whole matrix is shown
NUM_WORST = 12
NUM_PAIRS = 20
PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+")


def mistake_tables(run: RunFiles) -> str:
    """Return tables and pictures of the better of plain and averaged weights; empty where none have been tested."""
    known = [name for name in WEIGHTS if name in run.mistakes]
    if not known:
        return ""
    weights = max(known, key=lambda name: (run.best(name) or (0, 0.0))[1])
    mistakes = run.mistakes[weights]
    counts = {(target, answer): count for target, answer, count in mistakes["confusion"]}
    names = mistakes["classes"]
    text = f"The {WEIGHTS[weights]} weights of epoch {mistakes['epoch']}."
    matrix = _matrix(counts, names) if len(names) <= MAX_MATRIX else ""
    return f"<p>{escape(text)}</p>{_worst(counts, names)}{_pairs(counts, names)}{matrix}{_pictures(mistakes, names)}"


def _name(names: list[str], index: int) -> str:
    return names[index] if 0 <= index < len(names) else "no finite answer"


def _worst(counts: Mapping[tuple[int, int], int], names: list[str]) -> str:
    """Return a table of the classes with the lowest recall."""
    totals: dict[int, int] = defaultdict(int)
    taken_for: dict[int, tuple[int, int]] = {}
    for (target, answer), count in counts.items():
        totals[target] += count
        if answer != target and count > taken_for.get(target, (0, 0))[0]:
            taken_for[target] = (count, answer)
    recall = {target: counts.get((target, target), 0) / total for target, total in totals.items()}
    worst = sorted(taken_for, key=lambda target: (recall[target], target))[:NUM_WORST]
    if not worst:
        return "<p>No image was taken for another class.</p>"
    rows = [
        [
            Cell(_name(names, target), is_header=True),
            Cell(f"{100 * recall[target]:.1f} %", heat=0.6 * (1 - recall[target])),
            f"{counts.get((target, target), 0):,} of {totals[target]:,}",
            f"{_name(names, taken_for[target][1])} ({taken_for[target][0]:,})",
        ]
        for target in worst
    ]
    return f"<h3>Worst classes</h3>{table(['class', 'recognised', 'images', 'most often taken for'], rows)}"


def _pairs(counts: Mapping[tuple[int, int], int], names: list[str]) -> str:
    """Return a table of what is taken for what most often, where there are too many classes for a matrix."""
    wrong = sorted(((count, pair) for pair, count in counts.items() if pair[0] != pair[1]), reverse=True)[:NUM_PAIRS]
    if len(names) <= MAX_MATRIX or not wrong:
        return ""
    rows = [[_name(names, target), _name(names, answer), f"{count:,}"] for count, (target, answer) in wrong]
    return f"<h3>Most frequent confusions</h3>{table(['class', 'taken for', 'images'], rows)}"


def _matrix(counts: Mapping[tuple[int, int], int], names: list[str]) -> str:
    """Return the confusion matrix: a row for each class, a column for each answer."""
    answers = [*range(len(names)), *([-1] if any(answer < 0 for _, answer in counts) else [])]
    rows = []
    for target in range(len(names)):
        total = sum(counts.get((target, answer), 0) for answer in answers)
        found = [counts.get((target, answer), 0) for answer in answers]
        heats = [0.75 * count / total if total else 0.0 for count in found]
        cells = [Cell(f"{count:,}" if count else "", heat=heat) for count, heat in zip(found, heats, strict=True)]
        rows.append([Cell(names[target], is_header=True), *cells])
    header = ["class \\ answer", *(_name(names, answer) for answer in answers)]
    return f"<h3>Confusion</h3>{table(header, rows, kind='matrix')}"


def _pictures(mistakes: Mapping[str, Any], names: list[str]) -> str:
    """Return the most confident mistakes, picture by picture."""
    figures = "".join(_figure(mistake, names) for mistake in mistakes["mistakes"])
    return f'<h3>Most confident mistakes</h3><div class="pictures">{figures}</div>' if figures else ""


def _figure(mistake: Mapping[str, Any], names: list[str]) -> str:
    picture = str(mistake["picture"])
    image = str(mistake["image"])
    shown = "<p>no picture</p>"
    if found := PICTURE.fullmatch(picture):
        shown = f'<img class="{found[1]}" src="{picture}" alt="{escape(image)}">'
    return (
        f"<figure>{shown}<figcaption><b>{escape(_name(names, mistake['class']))}</b> taken for "
        f"<b>{escape(_name(names, mistake['answer']))}</b>, {100 * mistake['confidence']:.1f} %"
        f"<small>{escape(image)}</small></figcaption></figure>"
    )
