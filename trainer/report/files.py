"""What a run's folder holds, read as it is: a run that was killed is shown as far as it got."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs import load_config, to_dict

from .mistakes import mistakes_path

__all__ = ["WEIGHTS", "RunFiles", "read_run", "recipe_of"]

WEIGHTS = {"net": "plain", "net_E": "averaged"}
CONFIGS = "configs/mobilemamba"
FALLBACK = "mobilemamba_t2"  # the recipe that networks of other families are compared with


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """One run.

    Attributes:
        name: The folder's.
        records: One per epoch, as `epochs.jsonl` has them.
        config: Every entry by its path; empty if the file is missing.
        derived: The entries that follow from others.
        mistakes: By weights, as `find_mistakes` returns them.
    """

    name: str
    records: list[dict[str, Any]]
    config: dict[str, Any]
    derived: frozenset[str]
    mistakes: dict[str, dict[str, Any]]

    def tests(self, weights: str, key: str) -> list[tuple[int, float]]:
        """Return epoch and value of every test of the plain or the averaged weights."""
        return [
            (record["epoch"], record["test"][weights][key])
            for record in self.records
            if key in record.get("test", {}).get(weights, {})
        ]

    def best(self, weights: str) -> tuple[int, float] | None:
        """Return epoch and top-1, in percent, of the best test; the first of equals."""
        return max(self.tests(weights, "top1"), key=lambda test: test[1], default=None)


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder.

    Raises:
        ValueError: If it is none.
    """
    if not any((folder / name).is_file() for name in ("epochs.jsonl", "config.yaml")):
        raise ValueError(f"{folder} is no run's folder: it has neither epochs.jsonl nor config.yaml")
    entries = _read_config(folder / "config.yaml")
    return RunFiles(
        name=folder.resolve().name,
        records=_read_records(folder / "epochs.jsonl"),
        config=flatten(entries),
        derived=frozenset(entries.get("derived", ())),
        mistakes={name: found for name in WEIGHTS if (found := _read_mistakes(mistakes_path(folder, name)))},
    )


def recipe_of(run: RunFiles) -> tuple[str, dict[str, Any], frozenset[str]]:
    """Return the published recipe to compare a run with: its name, its entries and those that follow from others."""
    network = str(run.config.get("model.name", "")).lower()
    has_teacher = any(value == "CLSKDLoss" for path, value in run.config.items() if path.startswith("loss."))
    mode = str(run.config.get("mode", "train"))
    for name in (f"{network}s" if has_teacher else network, network, FALLBACK):
        try:
            entries = to_dict(load_config(f"{CONFIGS}/{name}", mode=mode))
        except ValueError:  # there is no such recipe
            continue
        return f"{CONFIGS}/{name}", flatten(entries), frozenset(entries["derived"])
    raise AssertionError(f"unreachable: there is {CONFIGS}/{FALLBACK}")


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return nested entries by their paths; items of a list go by their name or type, where they have one."""
    items: Mapping[Any, Any]
    if isinstance(value, Mapping) and value:
        items = value
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        items = {item.get("name") or item.get("type") or index: item for index, item in enumerate(value)}
    else:
        return {path: value} if path else {}
    flat: dict[str, Any] = {}
    for key, item in items.items():
        flat |= flatten(item, f"{path}.{key}" if path else str(key))
    return {entry: item for entry, item in flat.items() if entry.partition(".")[0] != "derived"}


def _read_records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            break
        if isinstance(record, dict) and isinstance(record.get("epoch"), int):
            records.append(record)
    return records


def _read_config(path: Path) -> dict[str, Any]:
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _read_mistakes(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and {"epoch", "classes", "confusion", "mistakes"} <= set(found) else {}
