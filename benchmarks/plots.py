"""Figures: accuracy against throughput, time against length, training speed and memory.

Drawn from the content of a result file, so that they can be drawn again: ``python -m benchmarks.plots FILE.json``.
The README's plot is one of them, as an SVG file that follows the reader's light or dark mode::

    python -m benchmarks.plots benchmarks/results/network-*.json --readme docs/accuracy-speed.svg
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from .labels import place_labels
from .parsers import new_parser

__all__ = ["draw", "draw_readme"]

ACCURACY = Path(__file__).resolve().parent / "accuracy.json"
OURS, PEER, LITERAL = "#cf222e", "#0969da", "#818b98"
_INK, _PAPER, _GRID = "#1f2328", "#ffffff", "#d1d9e0"
_DARK = {_INK: "#e6edf3", _PAPER: "#0d1117", _GRID: "#3d444d", OURS: "#ff7b72", PEER: "#58a6ff"}
_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), _PAPER),
    **dict.fromkeys(("grid.color", "legend.edgecolor"), _GRID),
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mobilemamba",  # the same names of elements every time
}


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """Draw what belongs to a benchmark's result.

    Args:
        result: Content of a result file.
        path: Without suffix.

    Returns:
        The picture's path.
    """
    drawers = {"network": _network, "runtimes": _runtimes, "scan": _scan, "train_step": _train_step}
    draw_into = drawers[result["benchmark"]]
    with mpl.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        draw_into(figure, result)
        figure.suptitle(_where(result["machine"]), fontsize=8)
        path = path.with_name(path.name + ".png")
        figure.savefig(path)
    return path


def draw_readme(result: Mapping[str, Any], path: Path) -> Path:
    """Draw accuracy against throughput in float32, at the largest batch measured, as SVG in light and dark colours.

    Args:
        result: Content of a result file of `benchmarks.network`.
        path: Of the picture.

    Returns:
        The same path.
    """
    batch = max(row["batch"] for row in result["best"])
    rows = [row for row in result["best"] if (row["batch"], row["precision"]) == (batch, "fp32")]
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.set_title(f"{_where(result['machine'])}, batch {batch}, float32", fontsize=9)
        _accuracy_panel(axes, rows, json.loads(ACCURACY.read_text()), size=8)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    path.write_text(buffer.getvalue().replace("<defs>", f"<style>{_dark_mode()}</style>\n <defs>", 1), encoding="utf-8")
    return path


def _dark_mode() -> str:
    """Return a style sheet that replaces the colours in the elements' own styles where the page is dark."""
    rules = "\n".join(
        f'[style*="{property}: {light}"] {{{property}: {dark} !important}}'
        for light, dark in _DARK.items()
        for property in ("fill", "stroke")
    )
    return f"@media (prefers-color-scheme: dark) {{\n{rules}\n}}"


def _where(machine: Mapping[str, Any]) -> str:
    if machine["device"] == "cuda":
        return f"{machine['gpu']}, torch {machine['torch']}"
    return f"{machine['cpu']}, {_threads(machine['threads'])}, torch {machine['torch']}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _network(figure: Figure, result: Mapping[str, Any]) -> None:
    """One panel per batch and precision: top-1 against the throughput of each network at its best, or its latency."""
    panels = list(dict.fromkeys((row["batch"], row["precision"]) for row in result["best"]))
    batches = list(dict.fromkeys(batch for batch, _ in panels))
    precisions = list(dict.fromkeys(precision for _, precision in panels))
    figure.set_size_inches(6 * len(precisions), 4.5 * len(batches))
    axes = figure.subplots(len(batches), len(precisions), squeeze=False)
    accuracy = json.loads(ACCURACY.read_text())
    for i, batch in enumerate(batches):
        for j, precision in enumerate(precisions):
            rows = [row for row in result["best"] if (row["batch"], row["precision"]) == (batch, precision)]
            _accuracy_panel(axes[i, j], rows, accuracy)
            axes[i, j].set_title(f"batch {batch}, {precision}")


def _accuracy_panel(
    axes: Axes, rows: Sequence[Mapping[str, Any]], accuracy: Mapping[str, Any], *, size: float = 6
) -> None:
    """Published accuracy against measured speed: latency for one image; ``size`` is that of the labels, in points."""
    is_latency = rows[0]["batch"] == 1
    speed = {row["network"]: 1e3 * row["latency_s"] if is_latency else row["images_per_s"] for row in rows}
    ours = [row["network"] for row in rows if row["kind"] == "ours"]
    for group, label, style in (
        ("longer", "MobileMamba†, 1000 epochs with teacher", "--"),
        ("models", "MobileMamba", "-"),
    ):
        points = [(speed[name], accuracy[group][name]["top1"]) for name in ours]
        if points:
            axes.plot(*zip(*points, strict=True), style, marker="o", color=OURS, label=label, markersize=4)
    labels = [(name.removeprefix("MobileMamba_"), speed[name], accuracy["models"][name]["top1"]) for name in ours]
    for has_teacher, label, face in ((False, "others", PEER), (True, "others, with teacher", "none")):
        names = [name for name in speed if accuracy["models"].get(name, {}).get("with_teacher") is has_teacher]
        points = [(speed[name], accuracy["models"][name]["top1"]) for name in names]
        if points:
            axes.scatter(*zip(*points, strict=True), s=16, facecolor=face, edgecolor=PEER, label=label)
        labels += [(name, *point) for name, point in zip(names, points, strict=True)]
    axes.set_xscale("log")
    speeds = [x for _, x, _ in labels]
    axes.set_xlim(0.8 * min(speeds), 2.3 * max(speeds))  # room for the fastest networks' labels
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ms for one image (measured)" if is_latency else "images/s (measured)")
    axes.set_ylabel("ImageNet-1K top-1, % (published)")
    axes.legend(fontsize=size, framealpha=1)
    place_labels(axes, labels, size=size)


def _runtimes(figure: Figure, result: Mapping[str, Any]) -> None:
    """Images/s of each network, a bar for each runtime and precision, a panel for each batch."""
    rows = result["cases"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    ways = list(dict.fromkeys((row["runtime"], row["precision"]) for row in rows))
    figure.set_size_inches(max(6.0, 1.6 * len(networks)), 3.2 * len(batches))
    colors = mpl.colormaps["tab10"]
    for axes, batch in zip(figure.subplots(len(batches), 1, squeeze=False)[:, 0], batches, strict=True):
        rates = {
            (row["network"], row["runtime"], row["precision"]): row["images_per_s"]
            for row in rows
            if row["batch"] == batch
        }
        for place, way in enumerate(ways):
            own = [rates.get((name, *way)) for name in networks]
            here = [(index, rate) for index, rate in enumerate(own) if rate is not None]
            positions = [index + 0.8 * place / len(ways) for index, _ in here]
            bars = axes.bar(positions, [rate for _, rate in here], 0.76 / len(ways), color=colors(place))
            bars.set_label(", ".join(way))
            axes.bar_label(bars, fmt="%.3g", fontsize=5)
        names = [name.removeprefix("MobileMamba_") for name in networks]
        axes.set_xticks([index + 0.4 * (len(ways) - 1) / len(ways) for index in range(len(names))], names, fontsize=7)
        axes.set_ylabel("images/s")
        axes.set_title(f"batch {batch}")
        axes.legend(fontsize=6)


def _scan(figure: Figure, result: Mapping[str, Any]) -> None:
    """Time against length, a panel per pass and number of threads."""
    rows = result["lengths"]
    panels = list(dict.fromkeys((row["pass"], row["threads"]) for row in rows))
    figure.set_size_inches(4.5 * len(panels), 4)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (direction, threads) in zip(all_axes, panels, strict=True):
        here = [row for row in rows if (row["pass"], row["threads"]) == (direction, threads)]
        for name in dict.fromkeys(row["implementation"] for row in here if not row["implementation"].endswith("R = 1")):
            points = [(row["length"], row["median_s"] * 1e6) for row in here if row["implementation"] == name]
            style = "k--" if name == "floor" else "-"
            axes.plot(*zip(*points, strict=True), style, marker=".", label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("L, positions")
        axes.set_ylabel("µs a call")
        place = "" if result["machine"]["device"] == "cuda" else f", {_threads(threads)}"
        axes.set_title(f"{direction}, B = {here[0]['batch']}, D = {here[0]['channels']}{place}")
        axes.legend(fontsize=7)


def _train_step(figure: Figure, result: Mapping[str, Any]) -> None:
    """Images/s and peak memory, ours next to the literal network."""
    rows = result["cases"]
    groups = list(dict.fromkeys((row["variant"], row["precision"]) for row in rows))
    figure.set_size_inches(max(6.0, 1.5 * len(groups)), 3.5)
    panels = (("images_per_s", 1.0, "images/s"), ("peak_bytes", 2.0**30, "peak memory, GiB"))
    for axes, (key, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for place, (kind, color) in enumerate((("literal", LITERAL), ("ours", OURS))):
            values = {(row["variant"], row["precision"]): row[key] / unit for row in rows if row["kind"] == kind}
            positions = [index + 0.4 * place for index, group in enumerate(groups) if group in values]
            heights = [values[group] for group in groups if group in values]
            bars = axes.bar(positions, heights, 0.38, color=color, label=kind)
            axes.bar_label(bars, fmt="%.3g", fontsize=6)
        names = [f"{variant.removeprefix('MobileMamba_')} {precision}" for variant, precision in groups]
        axes.set_xticks([index + 0.2 for index in range(len(groups))], names, fontsize=7)
        axes.set_ylabel(label)
        axes.legend(fontsize=7)


def main() -> None:
    """Draw the pictures of result files again, next to them, or one for the README."""
    parser = new_parser("plots", __doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "--readme", type=Path, metavar="FILE.svg", help="draw only accuracy against speed, to this file"
    )
    arguments = parser.parse_args()
    for path in arguments.files:
        result = json.loads(path.read_text())
        print(draw_readme(result, arguments.readme) if arguments.readme else draw(result, path.with_suffix("")))


if __name__ == "__main__":
    main()
