"""Results of `benchmarks.runtimes` as the tables of docs/deploy.md.

    python -m benchmarks.runtimes_table RESULT.json [RESULT.json ...]

One table for each network. Of a case that several results have, the last one's figures are shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from util.logging import markdown_table

from .parsers import new_parser

__all__ = ["main", "tables"]

Way = tuple[str, str, str]  # network, runtime, precision


def tables(results: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown: for each result its machine and versions, for each network a table, then what does not run.

    Args:
        results: Contents of result files.
    """
    parts = [_where(result["machine"]) for result in results]
    cases = _by_way(results, "cases")
    converted = _by_way(results, "converted")
    for network in dict.fromkeys(network for network, *_ in (*cases, *converted)):
        parts.append(_table(network, cases, converted))
    reasons = _reasons(results, cases)
    if reasons:
        parts.append("Not run:\n\n" + "\n".join(f"- {', '.join(ways)}: {reason}" for reason, ways in reasons.items()))
    return "\n\n".join(parts)


def _by_way(results: Sequence[Mapping[str, Any]], kind: str) -> dict[Way, dict[int, Mapping[str, Any]]]:
    """Return the rows of a kind, by way and batch size."""
    found: dict[Way, dict[int, Mapping[str, Any]]] = {}
    for row in (row for result in results for row in result.get(kind, ())):
        found.setdefault((row["network"], row["runtime"], row["precision"]), {})[row["batch"]] = row
    return found


def _where(machine: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items())
    features = ", ".join(feature.upper() for feature in machine["cpu_features"])
    return (
        f"{machine['cpu']} ({features}), {machine['threads']} threads of {machine['cores']} cores, Python "
        f"{machine['python']}, torch {machine['torch']}, {packages}; revision {machine['revision']}, load "
        f"{machine['load_average']:.1f} at the start, {machine['date'][:10]}."
    )


def _table(
    network: str,
    cases: Mapping[Way, Mapping[int, Mapping[str, Any]]],
    converted: Mapping[Way, Mapping[int, Mapping[str, Any]]],
) -> str:
    batches = sorted({batch for way, rows in cases.items() if way[0] == network for batch in rows})
    header = ["runtime", "precision", "file, MB", "largest error", "signal to noise, dB", "same first class"]
    lines = []
    for (name, runtime, precision), rows in cases.items():
        if name == network:
            speeds = [f"{rows[batch]['images_per_s']:.3g}" if batch in rows else "-" for batch in batches]
            lines.append([runtime, precision, *_quality(rows[min(rows)]), *speeds])
    for (name, runtime, precision), rows in converted.items():
        if name == network:
            size = _megabytes(rows[min(rows)]["num_bytes"])
            lines.append([runtime, precision, size, "converted, not run", "", "", *["-"] * len(batches)])
    is_right = [False, False, *[True] * (len(header) - 2 + len(batches))]
    columns = [*header, *(f"images/s, batch {batch}" for batch in batches)]
    return f"{network}:\n\n{markdown_table(columns, lines, is_right=is_right)}"


def _quality(row: Mapping[str, Any]) -> list[str]:
    agreeing = round(row["agreement"] * row["num_images"])
    return [
        _megabytes(row["num_bytes"]),
        f"{row['error']:.1e}",
        f"{row['decibels']:.1f}" if row["error"] else "-",
        f"{agreeing}/{row['num_images']}",
    ]


def _megabytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:.1f}"


def _reasons(results: Sequence[Mapping[str, Any]], measured: Mapping[Way, Any]) -> dict[str, list[str]]:
    """Return what runs with no batch size, and where a runtime is refused at one, by the reason given."""
    found: dict[str, list[str]] = {}
    failures = [row for result in results for row in result["failures"]]
    is_one = len({network for network, *_ in measured} | {row["network"] for row in failures}) == 1
    for row in failures:
        way = (row["network"], row["runtime"], row["precision"])
        batch = f" batch {row['batch']}" if way in measured else ""
        text = f"{row['runtime']} {row['precision']}{batch}" + ("" if is_one else f" of {row['network']}")
        ways = found.setdefault(row["reason"], [])
        if text not in ways:
            ways.append(text)
    return found


def main(command_line: Sequence[str] | None = None) -> None:
    """Print the tables of result files."""
    parser = new_parser("runtimes_table", __doc__)
    parser.add_argument("results", type=Path, nargs="+", help="result files of benchmarks.runtimes")
    paths = parser.parse_args(command_line).results
    print(tables([json.loads(path.read_text(encoding="utf-8")) for path in paths]))


if __name__ == "__main__":
    main()
