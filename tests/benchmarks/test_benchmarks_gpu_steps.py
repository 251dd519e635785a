"""The report's steps in small on the CPU, what they notice, and the tables of their figures. No time is asserted."""

from __future__ import annotations

import contextlib
import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import common, gpu_report, scan
from benchmarks.gpu import checks, networks, runs, worker
from benchmarks.gpu.context import Context, Settings
from benchmarks.gpu.figures import Figures, read
from benchmarks.gpu.steps import STEPS
from benchmarks.gpu.tables import tables
from model.lib_mamba import gated_scan

QUICK = ("environment", "exactness", "core", "triton", "batches", "convolutions", "process_group")
SLOW = (
    "operators",
    "throughput",
    "profile",
    "latency",
    "peers",
    "more",
    "training",
    "compile",
    "programs",
    "sanitizer",
    "tests",
)


@pytest.fixture
def context(tmp_path):
    """A report in small; torch.compile traces, and leaves the compiler out."""
    path = tmp_path / "gpu-report.jsonl"
    return Context(
        Settings(device="cpu", is_small=True, run="now", compiler="eager", path=str(path), folder=str(tmp_path))
    )


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Small tensors."""


def run(context, *names):
    """Run steps in this process, and return their lines."""
    for name in names:
        assert worker.run_step(name, context) == 0
    lines = list(read(context.figures.path))
    assert {line["step"]: line for line in lines}.keys() == set(names)
    problems = [(line["case"], line["error"] or line["figures"]) for line in lines if line["passed"] is False]
    assert not problems
    return lines


def test_the_quick_steps_run(context):
    lines = run(context, *QUICK)
    shapes = {(line["case"]["D"], line["case"]["L"]) for line in lines if line["step"] == "exactness"}
    assert shapes == {(224, 144), (384, 36), (448, 9)}
    core = [line for line in lines if line["step"] == "core"]
    assert {line["case"]["pass"] for line in core} == {"forward", "training forward", "backward"}
    assert all(line["figures"]["floor_s"] > 0 for line in core)
    text = tables([context.figures.path])
    for title in ("The scan against float64", "All scans of a pass", "Triton", "Process group"):
        assert f"## {title}\n" in text
    assert "What failed" not in text


class PretendGpu(Context):
    """A CPU that takes the branches of a GPU."""

    is_cuda = True


def test_the_branches_for_a_gpu_run(context, monkeypatch):
    """Everything but CUDA itself, whose calls do nothing here: no line of Python waits for a GPU to run at first."""
    properties = SimpleNamespace(L2_cache_size=1 << 18, uuid="0123")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**20)
    monkeypatch.setattr(Context, "_stream", lambda self: contextlib.nullcontext("stream"))
    captured = []
    monkeypatch.setattr("benchmarks.gpu.context.capture", lambda run, *, stream: captured.append(stream) or run)
    pretending = PretendGpu(context.settings)
    lines = run(pretending, "core", "latency")
    core = [line["figures"] for line in lines if line["step"] == "core"]
    assert all(own["precision"] == "bf16" and own["sets"] > 1 for own in core)
    modes = {line["case"]["mode"]: line["figures"] for line in lines if line["step"] == "latency"}
    assert modes["graph"]["peak_bytes"] == 2**20
    assert captured == ["stream"] * (2 * len(core)) + [None] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_slow_steps_run(name, context):
    assert run(context, name)
    assert "What failed" not in tables([context.figures.path])


def test_every_step_is_run_here():
    assert {*QUICK, *SLOW} == set(STEPS)


CALL = scan.Call(channels=24, length=7, rank=3)


def test_the_comparison_sees_every_image(monkeypatch):
    whole = checks.compare_scan(CALL, 5, torch.float32, "cpu")
    monkeypatch.setattr(checks, "SLICE_ELEMENTS", 2 * CALL.channels * CALL.length)
    sliced = checks.compare_scan(CALL, 5, torch.float32, "cpu")
    assert whole["passed"]
    assert whole["repeats"]
    assert sliced["errors"] == pytest.approx(whole["errors"], rel=1e-6, abs=1e-12)

    def wrong_in_the_middle(x, *others):
        y = gated_scan(x, *others)
        return y if x.dtype == torch.float64 else y * torch.tensor([1, 1, 1.001, 1, 1])[:, None, None]

    monkeypatch.setattr(checks, "gated_scan", wrong_in_the_middle)
    wrong = checks.compare_scan(CALL, 5, torch.float32, "cpu")
    assert not wrong["passed"]
    assert wrong["errors"]["y"] > 1e-4
    assert wrong["errors"]["norm_weight"] > 5e-5


@pytest.mark.parametrize("fault", ["nan", "unsteady"])
def test_the_comparison_sees_nan_and_results_that_change(fault, monkeypatch):
    calls = []

    def faulty(x, *others):
        y = gated_scan(x, *others)
        calls.append(x)
        if fault == "nan":
            return y if x.dtype == torch.float64 else y + torch.tensor([0, math.nan])[:, None, None]
        return y + 1e-9 * len(calls) if x.dtype == torch.float32 else y

    monkeypatch.setattr(checks, "gated_scan", faulty)
    found = checks.compare_scan(CALL, 2, torch.float32, "cpu")
    assert not found["passed"]
    assert math.isnan(found["errors"]["y"]) == (fault == "nan")


def test_a_graph_is_captured_on_the_stream_that_ran_the_forward_pass(monkeypatch):
    """The calls to CUDA in their order: warm-up and capture on one stream, which waits and is waited for."""
    log = []

    class Stream:
        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def __init__(self, name="own"):
            self.name = name

    class Graph:
        def replay(self):
            log.append("replay")

    main = Stream("main")

    @contextlib.contextmanager
    def noted(text):
        log.append(text)
        yield
        log.append(f"end of {text}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: noted(f"on {stream.name}"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: noted(f"capture on {stream.name}"))
    replay = common.capture(lambda: log.append("run") or "output", stream=Stream("given"))
    assert log[:2] == ["given waits for main", "on given"]
    assert log[2:] == [
        *["run"] * 3,
        "end of on given",
        "main waits for given",
        "capture on given",
        "run",
        "end of capture on given",
    ]
    assert replay() == "output"
    assert log[-1] == "replay"
    log.clear()
    with Context._stream(None) as stream:
        log.append(stream.name)
    assert log == ["own waits for main", "on own", "own", "end of on own", "main waits for own"]


def test_convolutions_are_found_in_a_folded_network(context):
    found = networks._convolutions_of(context, "MobileMamba_T2")
    assert {"in": 3, "groups": 1, "kernel": 3, "stride": 2, "side": context.scale.size}.items() <= found[0].items()
    assert any(setting["groups"] == setting["in"] for setting in found)
    assert len({json.dumps(setting) for setting in found}) == len(found)


def test_the_sanitizer_is_looked_for_in_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    tool = tmp_path / "cuda" / "compute-sanitizer" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch(mode=0o755)
    assert runs.find_sanitizer() == str(tool)


def test_totals_of_a_variant_count_each_call_as_often_as_it_is_made(tmp_path, capsys):
    """T2 makes its three calls 1, 2 and 2 times."""
    figures = Figures(tmp_path / "gpu-report.jsonl", "now")
    for channels, length, rank, microseconds in ((224, 144, 7, 100), (384, 36, 12, 10), (448, 9, 14, 1)):
        case = {"D": channels, "L": length, "R": rank, "batch": 256, "pass": "forward"}
        own = {"backend": "cuda", "precision": "bf16", "seconds": 1e-6 * microseconds, "floor_s": 5e-7 * microseconds}
        own |= {"copy_s": 2e-6, "times_floor": 2.0, "bytes_per_s": 1e12, "aim": 2.0}
        own["gauges"] = {"sm_mhz": [1900, 1980, 1980]}
        figures.write("core", case, passed=None, error="", seconds=1, figures=own)
    assert gpu_report.main(["--table", str(figures.path)]) == 0
    text = capsys.readouterr().out
    totals = text[text.index("## All scans") :].splitlines()
    cells = [cell.strip() for cell in totals[4].split("|")[1:-1]]
    assert cells == ["MobileMamba_T2", "256", "bf16", "forward", "cuda", "122", "61", "10", "2", "2"]
    assert " 1980 " in text
