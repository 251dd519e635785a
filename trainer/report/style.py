"""The style sheet of a run's page: light or dark as the reader's system is, in one column on a narrow screen."""

from __future__ import annotations

__all__ = ["STYLE"]

LIGHT = {
    "paper": "#ffffff", "ink": "#1f2328", "faint": "#59636e", "edge": "#d1d9e0", "room": "#f6f8fa", "mark": "#fff1c2",
    "heat": "#cf222e",
    "s0": "#0969da", "s1": "#cf222e", "s2": "#1a7f37", "s3": "#9a6700",
    "s4": "#8250df", "s5": "#bf3989", "s6": "#1b7c83", "s7": "#57606a",
}  # fmt: skip
DARK = {
    "paper": "#0d1117", "ink": "#e6edf3", "faint": "#9198a1", "edge": "#3d444d", "room": "#151b23", "mark": "#4b3a08",
    "heat": "#da3633",
    "s0": "#58a6ff", "s1": "#ff7b72", "s2": "#3fb950", "s3": "#d29922",
    "s4": "#bc8cff", "s5": "#f778ba", "s6": "#39c5cf", "s7": "#8b949e",
}  # fmt: skip

RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:16px}
h1{font-size:24px;overflow-wrap:anywhere}
h2{font-size:18px;margin:32px 0 12px;padding-bottom:4px;border-bottom:1px solid var(--edge);overflow-wrap:anywhere}
h3{font-size:15px;margin:24px 0 8px}
p{color:var(--faint);overflow-wrap:anywhere}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;border-bottom:1px solid var(--edge);text-align:left;vertical-align:top;min-width:3em;
max-width:24em;overflow-wrap:anywhere}
th{font-weight:600}
tbody th{color:var(--faint);font-weight:400}
td[style]{background:color-mix(in srgb,var(--heat-colour) var(--heat),transparent)}
td.changed{background:var(--mark)}
table.settings th,table.settings td{min-width:8em;font-family:ui-monospace,Menlo,Consolas,monospace;font-size:12px}
table.matrix td{text-align:right;padding:4px 6px}
table.matrix thead th{text-align:right;max-width:9em;padding:4px 6px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:16px}
figure{margin:0}
.chart{border:1px solid var(--edge);border-radius:6px;padding:10px;min-width:0}
.chart figcaption{font-weight:600;font-size:13px;margin-bottom:4px}
.chart>svg{display:block;width:100%;height:auto}
.chart text{font-size:11px;fill:var(--faint)}
.end{text-anchor:end}
.middle{text-anchor:middle}
.grid{stroke:var(--edge);stroke-width:1}
polyline,.swatch path{fill:none;stroke-width:1.8;stroke-linejoin:round}
.dashed{stroke-dasharray:4 3}
circle{stroke:none}
.legend{list-style:none;margin:6px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12px}
.legend li{overflow-wrap:anywhere}
.swatch{width:20px;height:8px;margin-right:5px}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(128px,1fr));gap:16px 12px}
.pictures img{height:112px;max-width:100%;object-fit:contain;background:var(--room)}
.pictures .png{image-rendering:pixelated}
.pictures p{height:112px;margin:0;padding:8px;background:var(--room)}
.pictures figcaption{font-size:12px;overflow-wrap:anywhere}
.pictures small{display:block;color:var(--faint)}
details{margin-top:16px}
summary{cursor:pointer}
"""


def _variables(colours: dict[str, str]) -> str:
    named = {("heat-colour" if name == "heat" else name): value for name, value in colours.items()}
    return f":root{{color-scheme:light dark;{''.join(f'--{name}:{value};' for name, value in named.items())}}}"


_LINES = "".join(
    f".s{index}{{stroke:var(--s{index})}}circle.s{index}{{fill:var(--s{index});stroke:none}}" for index in range(8)
)
STYLE = f"{_variables(LIGHT)}@media(prefers-color-scheme:dark){{{_variables(DARK)}}}{_LINES}{RULES}"
