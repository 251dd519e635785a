"""The figures of a report as tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common import table
from .figures import key_of, read

__all__ = ["tables"]

Line = Mapping[str, Any]
US, MS, GB, MIB = 1e6, 1e3, 1e-9, 2**-20


def tables(paths: Iterable[Path]) -> str:
    """Return every table of the files: the latest figure of each case counts, whichever run it is of."""
    latest: dict[str, Line] = {}
    for line in (line for path in paths for line in read(path) if line["case"]):
        key = key_of(line["step"], line["case"])
        if not line["error"] or key not in latest:
            latest[key] = line
    by_step: dict[str, list[Line]] = {}
    for line in latest.values():
        by_step.setdefault(line["step"], []).append(line)
    parts = [_machine(by_step.get("environment", []))]
    parts += [section for name, render in _SECTIONS.items() for section in render(by_step.get(name, []))]
    parts += _failures(latest.values())
    return "\n\n".join(part for part in parts if part)


def _well(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if not line["error"]]


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [f"## {title}", table(rows, header)] if rows else []


def _machine(lines: Sequence[Line]) -> str:
    """Return one line on the machine, and the memory's rate."""
    machine: Mapping[str, Any] = {}
    rate = ""
    for line in _well(lines):
        if line["case"]["what"] == "machine":
            machine = line["figures"]
        if line["case"]["what"] == "copy rate":
            rate = f", a contiguous copy moves {line['figures']['bytes_per_s'] * GB:.0f} GB/s"
    if not machine:
        return ""
    place = machine.get("gpu", machine["cpu"])
    cuda = f", CUDA {machine['cuda']}" if "cuda" in machine else ""
    return (
        f"{place}, PyTorch {machine['torch']}{cuda}, scan: {machine['scan_backend']['name']}, revision "
        f"{machine['revision']}, sources {machine['sources']}, {machine['date'][:10]}{rate}."
    )


def _exactness(lines: Sequence[Line]) -> list[str]:
    """Return the largest errors by number format and number of images."""
    groups: dict[tuple[str, int], list[Line]] = {}
    for line in _well(lines):
        groups.setdefault((line["case"]["precision"], line["case"]["batch"]), []).append(line)
    rows = []
    for (precision, batch), own in groups.items():
        errors = [line["figures"]["errors"] for line in own]
        outputs = max(max(each["y"], each["y in inference"]) for each in errors)
        gradients = max(value for each in errors for name, value in each.items() if not name.startswith("y"))
        passed = sum(line["passed"] is True for line in own)
        repeated = sum(line["figures"]["repeats"] for line in own)
        rows.append((precision, batch, len(own), outputs, gradients, repeated, passed))
    header = ("type", "images", "shapes", "error of y", "of gradients", "same twice", "passed")
    return _section("The scan against float64", header, [[_scientific(cell) for cell in row] for row in rows])


def _scientific(value: Any) -> Any:
    return f"{value:.1e}" if isinstance(value, float) else value


def _core(lines: Sequence[Line]) -> list[str]:
    return [*_core_totals(lines), *_calls("The scan, call by call", lines)]


def _core_totals(lines: Sequence[Line]) -> list[str]:
    """Return the time of all scans of a variant's forward and backward pass."""
    from model import list_models

    from .. import scan

    known = {_call_of(line["case"]): line["figures"] for line in _well(lines)}
    passes = list(dict.fromkeys(line["case"]["pass"] for line in lines))
    batches = list(dict.fromkeys(line["case"]["batch"] for line in lines))
    rows = []
    for variant in list_models():
        counts = scan.calls_of(variant)
        for batch in batches:
            for direction in passes:
                keys = [(call.channels, call.length, call.rank, batch, direction) for call in counts]
                if any(key not in known for key in keys):
                    continue
                seconds, floor, copy = (
                    sum(count * known[key][name] for key, count in zip(keys, counts.values(), strict=True))
                    for name in ("seconds", "floor_s", "copy_s")
                )
                first = known[keys[0]]
                rows.append(
                    (
                        variant,
                        batch,
                        first["precision"],
                        direction,
                        first["backend"],
                        seconds * US,
                        floor * US,
                        copy * US,
                        seconds / floor,
                        first["aim"],
                    )
                )
    header = ("network", "images", "type", "pass", "backend", "µs", "floor, µs", "copies, µs", "times the floor", "aim")
    return _section("All scans of a pass", header, rows)


def _call_of(case: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(case[name] for name in ("D", "L", "R", "batch", "pass"))


def _calls(title: str, lines: Sequence[Line]) -> list[str]:
    """Return a row for each timed call."""
    timed = [line for line in _well(lines) if line["case"]["pass"] != "check"]
    rows = [
        (
            *_call_of(line["case"]),
            own["backend"],
            own["seconds"] * US,
            own["copy_s"] * US,
            own["times_floor"],
            own["bytes_per_s"] * GB,
            _gauge(own, "sm_mhz"),
            _gauge(own, "power_w"),
        )
        for line in timed
        for own in [line["figures"]]
    ]
    header = ("D", "L", "R", "images", "pass", "backend", "µs", "copy, µs", "times the floor", "GB/s", "MHz", "W")
    return _section(title, header, rows)


def _gauge(figures: Mapping[str, Any], name: str) -> float | None:
    """Return the middle reading of a gauge."""
    reading = figures.get("gauges", {}).get(name)
    return reading[1] if reading else None


def _networks(title: str) -> Callable[[Sequence[Line]], list[str]]:
    """Return what makes the table of a step that times networks."""

    def render(lines: Sequence[Line]) -> list[str]:
        rows = [
            (
                case["network"],
                own["size"],
                case["batch"],
                own["precision"],
                case["layout"],
                case["mode"],
                own["images_per_s"],
                own["seconds"] * MS,
                None if own["aim_s"] is None else own["aim_s"] * MS,
                _gauge(own, "sm_mhz"),
                _gauge(own, "power_w"),
            )
            for line in _well(lines)
            for case, own in [(line["case"], line["figures"])]
        ]
        header = ("network", "px", "images", "type", "layout", "mode", "images/s", "ms", "aim, ms", "MHz", "W")
        return _section(title, header, rows)

    return render


def _training(lines: Sequence[Line]) -> list[str]:
    well = _well(lines)
    rows = [
        (
            case["network"],
            case["batch"],
            case["dtype"],
            case["mode"],
            own["images_per_s"],
            own["aim_images_per_s"],
            None if own["peak_bytes"] is None else own["peak_bytes"] * MIB,
            own["first_loss"],
            own["last_loss"],
            own["loss_scale"],
        )
        for line in well
        if "dtype" in line["case"]
        for case, own in [(line["case"], line["figures"])]
    ]
    header = ("network", "images", "autocast", "mode", "images/s", "aim", "peak MiB", "first loss", "last", "scale")
    return [*_section("Training steps", header, rows), *_profiles([line for line in well if "what" in line["case"]])]


def _profiles(lines: Sequence[Line]) -> list[str]:
    """Return the kernels of each profiled call."""
    sections = []
    for line in _well(lines):
        case, own = line["case"], line["figures"]
        rows = [
            (kernel["name"][:90], kernel["count"], kernel["seconds"] * US, 100 * kernel["seconds"] / own["seconds"])
            for kernel in own["kernels"]
        ]
        title = f"{case['network']}, {case.get('mode') or case['what']}: {own['launches']:.0f} launches, "
        sections += _section(f"{title}{own['seconds'] * US:.0f} µs", ("kernel", "times", "µs", "%"), rows)
    return sections


def _convolutions(lines: Sequence[Line]) -> list[str]:
    names = ("network", "in", "out", "groups", "kernel", "stride", "side")
    rows = [
        (
            *(line["case"][name] for name in names),
            own["channels_last_s"] * US,
            own["nchw_s"] * US,
            own["channels_last_s"] / own["nchw_s"],
        )
        for line in _well(lines)
        for own in [line["figures"]]
    ]
    rows.sort(key=lambda row: -row[-1])
    return _section("Convolutions, channels-last beside NCHW", (*names, "channels-last, µs", "NCHW, µs", "ratio"), rows)


def _verdicts(title: str) -> Callable[[Sequence[Line]], list[str]]:
    """Return what makes the table of a step that only passes or fails."""

    def render(lines: Sequence[Line]) -> list[str]:
        rows = [
            (
                ", ".join(map(str, line["case"].values())),
                {True: "yes", False: "NO", None: "-"}[line["passed"]],
                line["seconds"],
                line["error"] or _remark(line["figures"]),
            )
            for line in lines
            if line["case"].get("what") not in ("machine", "copy rate", "nvidia-smi")
        ]
        return _section(title, ("check", "passed", "seconds", "remark"), rows)

    return render


def _remark(figures: Mapping[str, Any]) -> str:
    summary = "; ".join(figures.get("summary", ()))
    top1 = f"top-1 {figures['top1']}" if figures.get("top1") is not None else ""
    return str(figures.get("problem") or figures.get("detail") or summary or top1)


def _failures(lines: Iterable[Line]) -> list[str]:
    failed = [line for line in lines if line["passed"] is False]
    rows = [(line["step"], str(line["case"]), line["error"] or str(line["figures"])[:200]) for line in failed]
    return _section("What failed", ("step", "case", "reason"), rows)


_SECTIONS: dict[str, Callable[[Sequence[Line]], list[str]]] = {
    "environment": _verdicts("Backends"),
    "exactness": _exactness,
    "operators": _verdicts("Operators"),
    "core": _core,
    "throughput": _networks("Throughput"),
    "latency": _networks("Latency"),
    "peers": _networks("Other networks"),
    "more": _networks("More networks"),
    "training": _training,
    "profile": _profiles,
    "programs": _verdicts("Programs"),
    "process_group": _verdicts("Process group"),
    "sanitizer": _verdicts("Sanitizer"),
    "tests": _verdicts("Tests"),
    "triton": lambda lines: _calls("Triton", lines),
    "batches": lambda lines: _calls("Fewer images", lines),
    "convolutions": _convolutions,
    "compile": _verdicts("Compiled beforehand"),
}
