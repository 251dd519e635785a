"""Which backend runs, what is said about it, and what happens where one is missing, foreign or broken."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import create_model
from model.lib_mamba import SS2D, backends, compiled, info, reference, self_check

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "model" / "lib_mamba" / "kernels" / "selective_scan"
CACHES = (backends.availability, backends._load, backends._choose, backends._warn, compiled.build_info, compiled.load)


def forget():
    for cache in CACHES:
        cache.cache_clear()
    backends._request.name = None


@pytest.fixture(autouse=True)
def fresh_choice():
    """Every test starts, and leaves, as if nothing had been chosen yet."""
    forget()
    yield
    forget()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make a package `mobilemamba_kernels` of a given build.json, whose library is no library."""

    def make(**build):
        folder = tmp_path / compiled.PACKAGE
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "_C.so").write_text("not a library")
        running = torch.__version__.split("+")[0]
        fields = {"version": "1.0.0", "schema": compiled.SCHEMA, "library": "_C.so", "torch": running, "cuda": None}
        (folder / "build.json").write_text(json.dumps(fields | build))
        monkeypatch.syspath_prepend(tmp_path)
        return folder

    return make


@pytest.fixture
def checked_on_cpu(monkeypatch):
    """Let what is to run on a GPU be tried on the CPU."""
    problem_of = self_check.problem_of
    monkeypatch.setattr(self_check, "problem_of", lambda backend, device: problem_of(backend, torch.device("cpu")))


@pytest.fixture
def only(monkeypatch, checked_on_cpu):
    """Make some backends available and the others not; return fakes that count their calls."""

    class Fake:
        def __init__(self):
            self.calls = 0

        def gated_scan(self, x, *arguments):
            self.calls += 1
            return reference.gated_scan(x, *arguments)

    def set_available(*names):
        fakes = {name: Fake() for name in names}
        load = backends._load
        known = {"reference": (True, "plain PyTorch")} | dict.fromkeys(names, (True, "1.0"))
        monkeypatch.setattr(backends, "availability", lambda name: known.get(name, (False, f"no {name} here")))
        monkeypatch.setattr(backends, "_load", lambda name: fakes[name] if name in fakes else load(name))
        return fakes

    return set_available


def scan_once(dtype=torch.float32):
    with torch.no_grad():
        return SS2D(16).to(dtype)(torch.randn(1, 16, 3, 3, dtype=dtype))


def test_the_choice_is_logged_once_with_its_reason(only, caplog):
    only()
    with caplog.at_level(logging.INFO, logger="model.lib_mamba.backends"):
        scan_once()
        scan_once()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert caplog.messages == ["scan on cpu: reference backend (plain PyTorch; cpu: no cpu here)"]


def test_the_fastest_available_is_taken(only):
    fakes = only("cpu", "cuda", "triton")
    assert [backends.choose(device).name for device in ("cpu", "cuda", "mps")] == ["cpu", "cuda", "reference"]
    scan_once()
    assert fakes["cpu"].calls == 1


def test_triton_comes_next_on_a_gpu(only):
    only("triton", "cpu")
    choice = backends.choose("cuda")
    assert choice.name == "triton"
    assert "no cuda here" in choice.reason


def test_plain_pytorch_on_a_gpu_is_a_warning(only, caplog):
    only("cpu")
    with caplog.at_level(logging.INFO, logger="model.lib_mamba.backends"):
        assert backends.choose("cuda").name == "reference"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "SLOW on a GPU" in record.message
    assert "no cuda here" in record.message
    assert "no triton here" in record.message


def test_tritons_interpreter_is_not_for_real_work_unless_asked_for(only, monkeypatch):
    only("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choice = backends.choose("cuda")
    assert choice.name == "reference"
    assert "TRITON_INTERPRET is set" in choice.reason
    with backends.use_backend("triton"):
        assert backends.choose("cuda").name == "triton"
        assert backends.choose("cpu").name == "triton"


def wrong(self, x, *arguments):
    return reference.gated_scan(x, *arguments) + 0.1


def broken(self, x, *arguments):
    raise RuntimeError("no kernel image is available")


def not_a_number(self, x, *arguments):
    return torch.full_like(x, float("nan"))


def wrong_gradient(self, grad, *arguments):
    dx, *others = reference.gated_scan_backward(grad, *arguments)
    return (2 * dx, *others)


@pytest.mark.parametrize(
    ("name", "function", "reason"),
    [
        ("gated_scan", wrong, "gated_scan is off by"),
        ("gated_scan", broken, "gated_scan raises RuntimeError .*: no kernel image is available"),
        ("gated_scan", not_a_number, "gated_scan is off by nan"),
        ("gated_scan_backward", wrong_gradient, "gated_scan_backward is off by"),
    ],
)
def test_a_backend_that_fails_on_a_gpu_is_passed_over_with_a_warning(name, function, reason, only, monkeypatch, caplog):
    fakes = only("cuda", "triton")
    monkeypatch.setattr(fakes["cuda"], name, function.__get__(fakes["cuda"]), raising=False)
    with caplog.at_level(logging.INFO, logger="model.lib_mamba.backends"):
        choice = backends.choose("cuda")
        backends.choose("cuda")
    assert choice.name == "triton"
    assert "cuda: fails its check" in choice.reason
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert re.search(f"the cuda backend is passed over, as it fails: {reason}", caplog.messages[0])
    with (
        backends.use_backend("cuda"),
        pytest.raises(RuntimeError, match=f"'cuda' was asked for, but on cuda it fails: {reason}"),
    ):
        backends.choose("cuda")


def test_a_backend_that_takes_the_gpu_along_is_an_error_that_tells_the_way_out(only, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("an illegal memory access was encountered")

    only("cuda", "triton")
    monkeypatch.setattr(self_check, "problem_of", lambda backend, device: "an illegal memory access was encountered")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(RuntimeError, match=r"takes the GPU along .*scan_backend=reference"):
        backends.choose("cuda")


def test_while_a_graph_is_captured_nothing_is_tried(only, monkeypatch):
    fakes = only("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backends.choose("cuda").name == "cuda"
    assert fakes["cuda"].calls == 0


def test_a_backend_that_passes_is_tried_once(only):
    fakes = only("cuda")
    assert backends.choose("cuda").name == "cuda"
    calls = fakes["cuda"].calls
    assert calls > 0
    backends.choose("cuda")
    assert fakes["cuda"].calls == calls


def test_on_the_cpu_nothing_is_tried(only, monkeypatch):
    fakes = only("cpu")
    monkeypatch.setattr(fakes["cpu"], "gated_scan", lambda *arguments: pytest.fail("tried"))
    assert backends.choose("cpu").name == "cpu"


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_real_backends_pass(name, require_backend):
    require_backend(name)
    assert self_check.problem_of(backends._load(name), torch.device("cpu")) == ""


def test_a_forced_backend_that_is_missing_is_an_error_that_tells_the_way_out(monkeypatch):
    monkeypatch.setattr(compiled, "PACKAGE", "mobilemamba_kernels_of_nobody")
    with pytest.raises(
        ValueError, match=r"'cpu' was asked for but cannot run: .* is not installed \(pip install .*selective_scan"
    ):
        backends.set_backend("cpu")
    with pytest.raises(ValueError, match="'cuda' was asked for"):
        create_model("MobileMamba_T2", scan_backend="cuda")
    with pytest.raises(ValueError, match="must be one of cuda, triton, cpu, reference, got 'gpu'"):
        create_model("MobileMamba_T2", scan_backend="gpu")
    assert backends.choose("cpu").name == "reference"


def test_a_forced_backend_serves_its_devices_alone(only):
    only("cpu", "cuda")
    backends.set_backend("cpu")
    assert [backends.choose(device).name for device in ("cpu", "cuda")] == ["cpu", "cuda"]
    with backends.use_backend("reference"):
        assert [backends.choose(device).name for device in ("cpu", "cuda")] == ["reference", "reference"]
    assert backends.choose("cpu").name == "cpu"
    backends.set_backend(None)
    assert "asked for" not in backends.choose("cpu").reason


def test_a_network_can_ask_for_a_backend(only):
    fakes = only("cpu")
    network = create_model("MobileMamba_T2", scan_backend="reference").eval()
    with torch.no_grad():
        network(torch.randn(1, 3, 32, 32))
    assert fakes["cpu"].calls == 0


def test_what_a_backend_does_not_cover_runs_on_the_reference_and_is_said(only, caplog):
    fakes = only("cpu")
    fakes["cpu"].gated_scan = lambda *arguments: NotImplemented
    with caplog.at_level(logging.INFO, logger="model.lib_mamba.backends"):
        assert scan_once().isfinite().all()
    assert "does not cover" in caplog.messages[-1]


def test_a_library_for_another_pytorch_is_never_loaded(package, monkeypatch):
    package(torch="1.13.1")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    is_available, reason = compiled.cpu.is_available()
    assert not is_available
    assert f"built for torch 1.13.1, this is {torch.__version__.split('+')[0]}: build it again" in reason
    assert backends.choose("cpu").name == "reference"


def test_a_library_for_another_version_of_the_operators_is_never_loaded(package):
    package(schema=compiled.SCHEMA + 1)
    assert "of another version" in compiled.cpu.is_available()[1]


def test_a_damaged_library_is_reported(package):
    package()
    is_available, reason = compiled.cpu.is_available()
    assert not is_available
    assert "does not load, build it again" in reason


def test_an_incomplete_package_is_reported(package):
    (package() / "build.json").write_text("{")
    assert "is incomplete: build it again" in compiled.cpu.is_available()[1]


def test_info_lists_and_checks(capsys):
    assert info.main() == 0
    output = capsys.readouterr().out
    assert "chosen on cpu:" in output
    assert "self-check of reference on cpu: passed" in output
    for name in backends.NAMES:
        assert f"\n{name}" in output


def test_info_fails_on_a_backend_that_is_wrong(only, capsys):
    fakes = only("cpu")
    fakes["cpu"].gated_scan = lambda x, *arguments: reference.gated_scan(x, *arguments) * 1.01
    assert info.main() == 1
    assert "self-check of cpu on cpu: FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "name"),
    [("default", "portable"), ("avx2", "AVX2"), ("avx512", "AVX-512")],
    ids=["default", "avx2", "avx512"],
)
def test_every_instruction_set_is_exact(capability, name, run_with_capability):
    output = run_with_capability(capability, "from model.lib_mamba import info; assert info.main() == 0; import torch")
    assert f", {name})" in output
    assert "self-check of cpu on cpu: passed" in output


@pytest.mark.slow
def test_the_published_command_builds_the_kernels(tmp_path):
    """`pip install .` with the isolation that pip has by default, against the PyTorch that is installed."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    source, target = tmp_path / "selective_scan", tmp_path / "installed"
    shutil.copytree(KERNELS, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, "."]
    environment = os.environ | {"FORCE_CUDA": "0", "MAX_JOBS": "2"}
    subprocess.run(command, cwd=source, env=environment, check=True)
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "model.lib_mamba.info"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "self-check of cpu on cpu: passed" in result.stdout


@pytest.mark.slow
def test_a_cuda_part_that_fails_to_build_leaves_the_rest(tmp_path):
    if shutil.which("c++") is None or torch.version.cuda is None:
        pytest.skip("no C++ compiler, or a PyTorch without CUDA")
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "release {torch.version.cuda}, V{torch.version.cuda}.1"\n'
    )
    nvcc.write_text(nvcc.read_text() + 'case "$*" in *csrc*) exit 1;; esac\n')
    nvcc.chmod(0o755)
    source, target = tmp_path / "selective_scan", tmp_path / "installed"
    shutil.copytree(KERNELS, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, "."]
    environment = os.environ | {"CUDA_HOME": str(tmp_path / "cuda"), "MAX_JOBS": "2"}
    environment.pop("FORCE_CUDA", None)
    subprocess.run(command, cwd=source, env=environment, check=True)
    build = json.loads((target / compiled.PACKAGE / "build.json").read_text())
    assert build["cuda"] is None
    assert "the CUDA part failed to build" in build["without_cuda"]
    assert (target / compiled.PACKAGE / build["library"]).is_file()
    forced = subprocess.run(command, cwd=source, env=environment | {"FORCE_CUDA": "1"}, check=False)
    assert forced.returncode != 0
