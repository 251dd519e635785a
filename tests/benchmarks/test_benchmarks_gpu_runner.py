"""The report's processes: figures are kept whatever happens to the one that measures them. No time is asserted."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.gpu import runner as runner_module
from benchmarks.gpu import steps, worker
from benchmarks.gpu.context import Context, Settings
from benchmarks.gpu.figures import Figures, read
from benchmarks.gpu.gauges import Gauges
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.steps import STEPS, Step

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(device="cpu", is_small=True, run="now")

# A worker without PyTorch. Its steps are lists of what each case does.
WORKER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.gpu.figures import Figures, key_of

orders = json.loads(sys.stdin.readline())
settings = orders["settings"]
figures = Figures(Path(settings["path"]), settings["run"])
done = figures.done(earlier=orders["is_resumed"])
for action in orders["step"].split("-"):
    case = {{"do": action}}
    if key_of(orders["step"], case) in done:
        continue
    Path(orders["current"]).write_text(json.dumps(case))
    if action == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if action == "lose":
        figures.write(orders["step"], case, passed=False, error="sticky", figures={{}})
        sys.exit(75)
    if action == "doze":
        time.sleep(2)
    if action == "hang":
        child = subprocess.Popen(["sleep", "600"])
        Path(settings["path"]).with_name("child").write_text(str(child.pid))
        time.sleep(600)
    figures.write(orders["step"], case, passed=action != "wrong", error="", figures={{"value": 1}})
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run steps by name with the worker above; return whether all was well, and the lines of the file."""
    monkeypatch.setattr(runner_module, "CPU_FACTOR", 1)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))

    def do(*names, seconds=120.0, limit=60, settings=SETTINGS, is_resumed=False, **options):
        chosen = [
            Step(name=name, title="", seconds=1, limit=limit, function=("", ""), **options.get(name, {}))
            for name in names
        ]
        command = (sys.executable, str(script))
        runner = Runner(tmp_path, settings, seconds=seconds, is_resumed=is_resumed, command=command)
        return runner.run(chosen), list(read(tmp_path / "gpu-report.jsonl"))

    return do


def outcomes(lines, step):
    return {line["case"]["do"]: line["passed"] for line in lines if line["step"] == step and line["case"]}


def end_of(lines, step):
    (end,) = (line for line in lines if line["step"] == step and not line["case"])
    return end["stopped"]


def test_all_that_passes_is_well(run):
    is_well, lines = run("one-two", "three")
    assert is_well
    assert outcomes(lines, "one-two") == {"one": True, "two": True}
    assert end_of(lines, "three") == ""


def test_a_crash_costs_the_case_at_work_and_no_other(run):
    is_well, lines = run("one-crash-two", "three")
    assert not is_well
    assert outcomes(lines, "one-crash-two") == {"one": True, "crash": False, "two": True}
    assert [line["error"] for line in lines if line["case"] == {"do": "crash"}] == ["the process ended with -11"]
    assert outcomes(lines, "three") == {"three": True}


def test_a_lost_gpu_costs_the_case_at_work_and_no_other(run):
    is_well, lines = run("one-lose-two")
    assert not is_well
    assert outcomes(lines, "one-lose-two") == {"one": True, "lose": False, "two": True}


def test_a_step_that_hangs_is_stopped_with_its_children(run, tmp_path):
    is_well, lines = run("one-hang-two", "three", limit=5)
    assert not is_well
    assert outcomes(lines, "one-hang-two") == {"one": True}
    assert end_of(lines, "one-hang-two").endswith("at {'do': 'hang'}")
    assert outcomes(lines, "three") == {"three": True}
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_wrong_figure_is_not_well(run):
    is_well, lines = run("one-wrong")
    assert not is_well
    assert end_of(lines, "one-wrong") == ""


def test_steps_beyond_the_budget_are_left_out_and_said_so(run):
    is_well, lines = run("one", seconds=1.0)
    assert not is_well
    assert end_of(lines, "one").startswith("left out")


def test_a_timed_step_waits_for_those_behind(run):
    options = {"doze-behind": {"is_behind": True}, "timed": {"is_timed": True}}
    is_well, lines = run("doze-behind", "beside", "timed", **options)
    assert is_well
    assert [line["case"]["do"] for line in lines if line["case"]] == ["beside", "doze", "behind", "timed"]


def test_a_later_run_does_only_what_is_not_done(run):
    run("one-crash")
    later = Settings(device="cpu", is_small=True, run="later")
    _, lines = run("one-crash", settings=later, is_resumed=True)
    assert [line["case"] for line in lines if line["run"] == "later" and line["case"]] == [{"do": "crash"}]
    _, lines = run("one-crash", settings=Settings(device="cpu", is_small=True, run="last"))
    assert sum(line["run"] == "last" and bool(line["case"]) for line in lines) == 2


def test_workers_end_with_their_parent(tmp_path):
    """The true worker, which would otherwise keep the GPU."""
    code = "import sys; from benchmarks.gpu import worker; worker._end_with_parent()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True)
    time.sleep(0.5)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(60) == -9


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "figures.jsonl"
    figures = Figures(path, "now")
    figures.write("core", {"D": 3}, passed=None, error="", figures={"seconds": 1.5})
    with path.open("a") as file:
        file.write('{"run": "now", "step": "core", "case": {"D": 4}, "fig')
    assert [line["case"] for line in read(path)] == [{"D": 3}]
    assert figures.find("core", {"D": 3}) == {"seconds": 1.5}
    assert figures.find("core", {"D": 4}) is None


@pytest.fixture
def context(tmp_path):
    return Context(
        Settings(device="cpu", is_small=True, run="now", path=str(tmp_path / "figures.jsonl"), folder=str(tmp_path))
    )


def test_a_case_that_raises_is_a_line_with_its_reason(context, monkeypatch, capsys):
    def cases(given):
        def fail():
            raise RuntimeError("no kernel image\nand more")

        yield {"case": 1}, fail
        yield {"case": 2}, lambda: {"seconds": 2.0, "passed": True}

    monkeypatch.setattr(worker, "cases_of", lambda step: cases)
    assert worker.run_step("core", context) == 0
    first, second = read(context.figures.path)
    assert (first["passed"], first["error"]) == (False, "RuntimeError: no kernel image")
    assert (second["passed"], second["figures"]) == (True, {"seconds": 2.0})
    assert "and more" in capsys.readouterr().err
    monkeypatch.setattr(worker, "_is_device_lost", lambda context: True)
    context.figures.run = "later"
    assert worker.run_step("core", context, is_resumed=True) == worker.DEVICE_LOST
    assert len(list(read(context.figures.path))) == 3


NVML = """
unsigned calls;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char* name, void** handle) { return 6; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) { *handle = &calls; return index; }
int nvmlDeviceGetClockInfo(void* handle, int kind, unsigned* mhz) {
  *mhz = kind == 1 ? 1980 - 10 * (++*(unsigned*)handle % 2) : 3201;
  return 0;
}
int nvmlDeviceGetPowerUsage(void* handle, unsigned* milliwatts) { *milliwatts = 512300; return 0; }
int nvmlDeviceGetTemperature(void* handle, int sensor, unsigned* celsius) { return 3; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_gauges_are_read_through_nvmls_interface(tmp_path):
    (tmp_path / "nvml.c").write_text(NVML)
    library = tmp_path / "nvml.so"
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "nvml.c", "-o", library], check=True)
    start = time.perf_counter()
    gauges = Gauges("0123", library=str(library))
    calls = ctypes.c_uint.in_dll(ctypes.CDLL(str(library)), "calls")
    while calls.value < 4:
        time.sleep(0.01)
    found = gauges.between(start, time.perf_counter())
    assert found == {"sm_mhz": [1970, found["sm_mhz"][1], 1980], "memory_mhz": [3201] * 3, "power_w": [512.3] * 3}
    assert gauges.between(0, 0)["memory_mhz"] == [3201] * 3  # between samples: read now


def test_without_nvml_there_are_no_gauges():
    assert Gauges(library="libnothing.so.1").between(0, 1) == {}


def test_the_plan_names_every_step_in_order():
    lines = gpu_report.plan(list(STEPS.values()), minutes=8).splitlines()
    assert [line.split()[2] for line in lines[:-1]] == list(STEPS)
    starts = [int(line.split()[0]) for line in lines]
    assert starts == sorted(starts)
    assert all(step.limit > step.seconds for step in STEPS.values())
    assert all(callable(steps.cases_of(step)) for step in STEPS.values())


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "mobilemamba_kernels"
    folder.mkdir()
    (folder / "_C.abi3.so").touch()

    def describe(**fields):
        (folder / "build.json").write_text(json.dumps(fields))
        return folder

    return describe


def test_prebuilt_kernels_are_checked_before_anything_starts(package, tmp_path, capsys):
    import torch

    running = torch.__version__.split("+")[0]
    folder = package(library="_C.abi3.so", torch=running)
    assert gpu_report.kernels_folder(folder) == gpu_report.kernels_folder(tmp_path) == tmp_path
    package(library="_C.abi3.so", torch="1.13.1")
    with pytest.raises(SystemExit):
        gpu_report.parse(["--device", "cpu", "--kernels", str(folder)])
    assert f"built for torch 1.13.1, this is {running}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no mobilemamba_kernels with a build\.json there"):
        gpu_report.kernels_folder(tmp_path / "elsewhere")
    package(library="_C.so", torch=running)
    with pytest.raises(ValueError, match="with its library"):
        gpu_report.kernels_folder(folder)


def test_given_kernels_come_first_for_the_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "before")
    runner = Runner(tmp_path, SETTINGS, seconds=1, kernels=tmp_path / "kernels")
    assert runner.environment["PYTHONPATH"] == f"{tmp_path / 'kernels'}{os.pathsep}before"


def test_without_a_gpu_it_says_what_works(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_report.parse([])
    assert "--device cpu runs every step in small" in capsys.readouterr().err


def test_the_report_needs_few_packages():
    """On the machine that has the GPU there may be no others."""
    code = """
import sys
for name in ("lmdb", "tensorboardX", "matplotlib", "sklearn", "fvcore", "pytest", "hypothesis", "pynvml", "scipy"):
    sys.modules[name] = None
from benchmarks import gpu_report
from benchmarks.gpu import worker
worker._import_all()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
