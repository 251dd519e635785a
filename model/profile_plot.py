"""A profile as bars: a row for each stage, coloured by kind of layer, as SVG in light or dark colours."""

from __future__ import annotations

from html import escape

from .profile_parts import Profile

__all__ = ["draw_bars"]

# Lengths in pixels.
WIDTH, ROW, BAR, LEFT, RIGHT, TOP, GAP = 720, 30, 18, 120, 130, 34, 16
LETTER = 6.2  # a letter's width at most, for the legend's places
COLOURS = (
    ("#0969da", "#58a6ff"),
    ("#cf222e", "#ff7b72"),
    ("#1a7f37", "#3fb950"),
    ("#bf8700", "#d29922"),
    ("#8250df", "#bc8cff"),
    ("#bf3989", "#f778ba"),
    ("#1b7c83", "#39c5cf"),
    ("#6e7781", "#8b949e"),
    ("#953800", "#ffa657"),
    ("#4d2d00", "#e3b341"),
)


def draw_bars(profile: Profile) -> str:
    """Return the plot of a profile: the time of each stage, divided among kinds of layers."""
    stages = profile.sums("stage")
    kinds = [part.kind for part in sorted(profile.sums("kind"), key=lambda part: -part.seconds)]
    colours = {kind: f"k{index % len(COLOURS)}" for index, kind in enumerate(kinds)}
    scale = (WIDTH - LEFT - RIGHT) / max(max(stage.seconds for stage in stages), 1e-12)
    drawn = []
    for index, stage in enumerate(stages):
        top = TOP + index * ROW
        drawn.append(f'<text x="{LEFT - 8}" y="{top + 13}" class="end">{escape(stage.stage)}</text>')
        left = float(LEFT)
        for part in sorted((p for p in profile.parts if p.stage == stage.stage), key=lambda p: kinds.index(p.kind)):
            width = scale * part.seconds
            title = f"{part.stage}, {part.kind}: {1e3 * part.seconds:.3f} ms, {100 * part.share:.1f} %"
            drawn.append(
                f'<rect class="{colours[part.kind]}" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BAR}">'
                f"<title>{escape(title)}</title></rect>"
            )
            left += width
        figure = f"{1e3 * stage.seconds:.2f} ms, {100 * stage.share:.0f} %"
        drawn.append(f'<text x="{left + 6:.1f}" y="{top + 13}">{figure}</text>')
    legend, bottom = _legend(kinds, colours, TOP + len(stages) * ROW + GAP)
    title = f"{profile.network}, {' x '.join(map(str, profile.images))}, {profile.device}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" width="{WIDTH}" height="{bottom}">'
        f"<style>{_style()}</style>\n"
        f'<rect class="paper" width="{WIDTH}" height="{bottom}"/>\n'
        f'<text x="{GAP}" y="20" class="title">{escape(title)}</text>\n' + "\n".join([*drawn, *legend]) + "\n</svg>\n"
    )


def _legend(kinds: list[str], colours: dict[str, str], top: float) -> tuple[list[str], int]:
    """Return the names of the kinds with their colours, in rows, and where these end."""
    drawn, left = [], float(GAP)
    for kind in kinds:
        width = 20 + LETTER * len(kind) + GAP
        if left + width > WIDTH:
            left, top = float(GAP), top + 20
        drawn.append(f'<rect class="{colours[kind]}" x="{left:.1f}" y="{top - 10}" width="12" height="12"/>')
        drawn.append(f'<text x="{left + 17:.1f}" y="{top}">{escape(kind)}</text>')
        left += width
    return drawn, int(top + GAP)


def _style() -> str:
    light = "".join(f".k{index}{{fill:{colour}}}" for index, (colour, _) in enumerate(COLOURS))
    dark = "".join(f".k{index}{{fill:{colour}}}" for index, (_, colour) in enumerate(COLOURS))
    return (
        "text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-weight:600}.end{text-anchor:end}"
        f".paper{{fill:#fff}}{light}"
        f"@media(prefers-color-scheme:dark){{text{{fill:#e6edf3}}.paper{{fill:#0d1117}}{dark}}}"
    )
