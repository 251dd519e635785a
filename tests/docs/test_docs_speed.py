"""The tables of docs/speed.md hold what the result files do."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def tables(head):
    """Each table whose head begins so: its rows of cells, with the names of our networks as the results have them."""
    _, *parts = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8").split(f"\n| {head} |")
    bodies = [part.split("\n\n")[0].splitlines()[2:] for part in parts]
    return [
        [[cell.strip(" *").replace("MobileMamba-", "MobileMamba_") for cell in line.split("|")[1:-1]] for line in body]
        for body in bodies
    ]


def short(value):
    return f"{value:.3g}"


def test_inference_is_that_measured():
    result = results("avx2/network-amd-epyc-2-threads.json")
    fastest = {}
    for case in result["cases"]:
        key = case["network"], case["mode"], case["batch"]
        fastest[key] = min(case["median_s"], fastest.get(key, case["median_s"]))
    rising = sorted(result["best"], key=lambda case: case["images_per_s"])  # shvit_s3 was measured twice
    best = {(case["network"], case["batch"]): case for case in rising}
    ratios = {(ratio["network"], ratio["over"], ratio["batch"]): ratio["best"] for ratio in result["ratios"]}
    (ours,) = tables("network | px | one image, ms | in ONNX Runtime")
    assert len(ours) == 6
    for network, _, *cells in ours:
        modes = ("eager", "onnxruntime", "openvino")
        times = [(fastest[network, mode, 1], fastest[network, mode, 16]) for mode in modes]
        assert cells == [*(short(1e3 * one) for one, _ in times), *(short(16 / batch) for _, batch in times)]
    (compared,) = tables("compared | with")
    assert len(compared) >= 20
    for network, other, *cells in compared:
        one, batch = best[other, 1], best[other, 16]
        times = [str(one["size"]), short(1e3 * one["latency_s"]), short(batch["images_per_s"])]
        assert cells == [*times, *(f"{ratios[f'MobileMamba_{network}', other, size]:.2f}" for size in (1, 16))]


def test_training_is_that_measured():
    files = ("avx2/train-step-amd-epyc-2-threads.json", "train-step-intel-r-xeon-r-processor-2-threads.json")
    for table, file in zip(tables("network | images/s"), files, strict=True):
        result = results(file)
        ours = {case["variant"]: case for case in result["cases"] if case["kind"] == "ours"}
        ratios = {ratio["variant"]: ratio for ratio in result["ratios"]}
        for network, *cells in table:
            case, ratio = ours[network], ratios[network]
            sizes = f"{case['above_start_bytes'] / 2**20:.0f}", f"{ratio['above_start_bytes']:.2f}"
            assert cells == [short(case["images_per_s"]), f"{ratio['speed']:.2f}", *sizes]


def test_the_speed_beside_other_programs_is_that_measured():
    expected = {}
    for case in results("avx2/busy-amd-epyc-2-threads.json")["cases"]:  # with nothing set, then passive
        speeds = short(case["quiet_images_per_s"]), short(case["busy_images_per_s"])
        expected.setdefault((case["work"], case["batch"]), []).extend((*speeds, f"{case['share_of_fair']:.2f}"))
    (table,) = tables("work | images/s alone")
    assert [cells for _, *cells in table] == list(expected.values())
