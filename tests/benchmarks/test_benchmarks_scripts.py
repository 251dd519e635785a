"""Every script runs on a tiny case and leaves a result file and a picture. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import busy, network, scan, train_step
from benchmarks import data as data_benchmark
from util.cores import CHOICES

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--quick", "--device", "cpu", "--threads", "1", "--warmup", "0", "--seconds", "0", "--runs", "1"]
MACHINE = {"cpu", "cores", "threads", "torch", "timm", "scan_backend", "revision", "load_average", "date"}
TIMES = {"median_s", "first_quartile_s", "third_quartile_s", "samples", "foreign_load", "is_disturbed"}

# In a process that PyTorch has given two threads before it was left one core: the threads of each script.
ONE_CORE = """
import logging, os, sys, torch
torch.set_num_threads(2)
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
from benchmarks import busy, network, runtimes, scan, train_step
from benchmarks.common import describe_machine, set_up
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
modules = busy, network, runtimes, scan, train_step
print(*(module.parse(["--device", "cpu", "--quick"]).threads for module in modules))
for options in ([], ["--threads", "2"]):
    set_up(train_step.parse(options))
    machine = describe_machine("cpu")
    print(machine["threads"], machine["cores"])
"""


@pytest.fixture
def run(tmp_path):
    def run_script(module, *options):
        arguments = module.parse([*SHORT, "--turns", "2", "--out", str(tmp_path), *options])
        module.run(arguments)
        (path,) = tmp_path.glob("*-quick.json")
        assert module in (busy, data_benchmark) or path.with_suffix(".png").stat().st_size > 1000
        result = json.loads(path.read_text())
        assert set(result["machine"]) >= MACHINE
        assert result["plan"]["turns"] == 2
        assert result["settings"]["quick"] is True
        return result

    return run_script


def test_network(run):
    names = ["MobileMamba_T2", "MobileMamba_T2 (literal)", "mobilenetv4_conv_small"]
    result = run(network, "--batches", "1", "--precisions", "fp32", "amp", "--networks", *names)
    cases = result["cases"]
    assert {(case["network"], case["layout"]) for case in cases} == {
        *((name, "nchw") for name in names),
        ("MobileMamba_T2", "channels_last"),
        ("mobilenetv4_conv_small", "channels_last"),
    }
    assert all(set(case) >= {"precision", "mode", "batch", "size", "images_per_s", *TIMES} for case in cases)
    assert all(case["images_per_s"] == pytest.approx(case["batch"] / case["median_s"]) for case in cases)
    assert len(result["best"]) == 6
    assert {(row["over"], row["precision"], row["over_precision"]) for row in result["ratios"]} == {
        ("MobileMamba_T2 (literal)", "fp32", "fp32"),
        ("MobileMamba_T2 (literal)", "amp", "amp"),
        ("mobilenetv4_conv_small", "fp32", "fp32"),
        ("mobilenetv4_conv_small", "amp", "amp"),
        ("MobileMamba_T2", "amp", "fp32"),
    }
    assert all(0 < row["share"] < 1 for row in result["scan_share"])
    assert result["failures"] == []


@pytest.mark.slow
def test_each_network_in_every_mode(tmp_path):
    """One of ours and a peer, in a process that ends with the runtimes' threads; one row for each is the best."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    names, modes = ["MobileMamba_T2", "mobilenetv4_conv_small"], ["plain", "onnxruntime", "openvino"]
    options = ["--batches", "1", "--precisions", "fp32", "amp", "--networks", *names, "--modes", *modes]
    command = [sys.executable, "-m", "benchmarks.network", *SHORT, "--turns", "2", "--out", str(tmp_path), *options]
    subprocess.run(command, cwd=ROOT, check=True)
    (path,) = tmp_path.glob("*-quick.json")
    result = json.loads(path.read_text())
    assert result["failures"] == []
    own = [case for case in result["cases"] if case["layout"] == "own"]
    exported = {(case["network"], case["mode"], case["precision"]) for case in own}
    assert exported == {(name, mode, "fp32") for name in names for mode in modes[1:]}
    plain = {case["network"] for case in result["cases"] if case["mode"] == "plain"}
    assert plain == {"MobileMamba_T2"}
    assert [row["network"] for row in result["best"] if row["precision"] == "fp32"] == names
    assert set(result["machine"]["packages"]) >= {"onnxruntime", "openvino"}


def test_a_mode_that_is_not_installed_is_said(monkeypatch, caplog):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, "openvino", None)
    arguments = network.parse(["--device", "cpu"])
    assert set(arguments.modes) >= {"eager", "compile", "onnxruntime"}
    assert "openvino" not in arguments.modes
    assert "openvino is not measured: the format openvino needs openvino: pip install" in caplog.text


def test_a_network_that_fails_is_listed(run, monkeypatch):
    def prepare(case, *rest):
        if case.precision == "amp":
            raise RuntimeError("no such kernel\nand more")
        return original(case, *rest)

    original = network._prepare
    monkeypatch.setattr(network, "_prepare", prepare)
    result = run(network, "--batches", "1", "--precisions", "fp32", "amp", "--networks", "MobileMamba_T2")
    assert {failure["reason"] for failure in result["failures"]} == {"no such kernel"}
    assert {case["precision"] for case in result["cases"]} == {"fp32"}


def test_memory_is_kept_or_the_run_refused(run, monkeypatch):
    asked = []
    monkeypatch.setattr(network, "keep_freed_memory", lambda: not asked.append(True))
    options = ("--batches", "1", "--networks", "MobileMamba_T2", "--keep-memory")
    assert run(network, *options)["settings"]["keep_memory"] is True
    assert asked == [True]
    monkeypatch.setattr(network, "keep_freed_memory", lambda: False)
    with pytest.raises(RuntimeError, match="--keep-memory needs glibc"):
        run(network, *options)


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.cpu_count() < 2, reason="one of two cores, on Linux")
def test_as_many_threads_as_cores_unless_told():
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}
    command = [sys.executable, "-c", ONE_CORE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    expected = ["1 1 1 1 1", "1 thread (1 core by affinity)", "1 1", "2 threads (1 core by affinity)", "2 1"]
    assert [line for line in done.stdout.splitlines() if line[:1].isdecimal()] == expected


def test_cuda_graphs_need_cuda():
    with pytest.raises(SystemExit):
        network.parse(["--device", "cpu", "--cuda-graph"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scan(run, precision):
    result = run(scan, "--variants", "MobileMamba_T2", "--lengths", "3", "10", "--precision", precision)
    keys = {"channels", "length", "rank", "pass", "threads", "implementation", "bytes", "over_floor", *TIMES}
    assert all(set(row) >= keys for row in result["calls"] + result["lengths"])
    assert {row["implementation"] for row in result["calls"]} >= {"floor", "reference", "literal"}
    assert {row["pass"] for row in result["calls"]} == {"forward", "backward"}
    floor = [row for row in result["totals"] if row["implementation"] == "floor"]
    elements = {"forward": 3, "backward": 5}
    size = {"fp32": 4, "bf16": 2}[precision]
    area = 224 * 144 + 2 * 384 * 36 + 2 * 448 * 9
    assert {row["pass"]: row["bytes"] for row in floor} == {key: n * size * area for key, n in elements.items()}
    literal = next(row for row in result["totals"] if row["implementation"] == "literal")
    assert literal["over_prototype"] == pytest.approx(literal["seconds"] / 88e-6)
    assert literal["bytes"] > 10 * floor[0]["bytes"]


def test_train_step(run):
    result = run(train_step, "--variants", "MobileMamba_T2", "--batch", "2")
    ours, literal = result["cases"]
    assert (ours["kind"], literal["kind"]) == ("ours", "literal")
    for case in (ours, literal):
        assert set(case) >= {"images_per_s", "precision", "batch", *TIMES}
        assert 50 * 2**20 < case["above_start_bytes"] < case["peak_bytes"]
    (ratio,) = result["ratios"]
    assert ratio["peak_bytes"] == pytest.approx(ours["peak_bytes"] / literal["peak_bytes"])


def test_data(run):
    pytest.importorskip("simplejpeg")
    pytest.importorskip("cv2")
    result = run(data_benchmark, "--images", "6", "--size", "32", "--workers", "0", "1")
    keys = ("type", "loader_type", "resize", "warp", "workers")
    cases = {tuple(case[key] for key in keys): case for case in result["cases"]}
    assert {key[0] for key in cases} == {"DefaultCLS", "ImageFolderLMDB", "Shards"}
    assert {key[1:] for key in cases} == {(*way, workers) for way in data_benchmark.WAYS for workers in (0, 1)}
    assert cases["DefaultCLS", "pil", "pil", "pil", 0]["speedup"] == 1
    assert all(case["images_per_s"] == pytest.approx(6 / case["median_s"]) for case in cases.values())
    assert len(result["stages"]) == 7
    assert all(0 < row[stage] < 10 for row in result["stages"] for stage in ("read", "decode", "augment", "collate"))


@pytest.mark.slow
def test_busy(run):
    result = run(busy, "--variants", "MobileMamba_T2")
    works = [(case["work"], case["batch"]) for case in result["cases"]]
    assert works == [work for work in (("inference", 1), ("inference", 16), ("training", 16)) for _ in range(2)]
    assert {case["wait_policy"] for case in result["cases"]} == {"", "passive"}
    cores = result["machine"]["cores"]
    for case in result["cases"]:
        fair = case["quiet_images_per_s"] * cores / (cores + max(cores, case["threads"]))
        assert case["share_of_fair"] == pytest.approx(case["busy_images_per_s"] / fair)
