"""Choice of a backend: its order, its log line, and backends that are missing, built for another PyTorch or broken."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from model import create_model
from model.lib_mamba import SS2D, backends, info, library, reference, trial

pytestmark = pytest.mark.usefixtures("fresh_choice")


@pytest.fixture
def checked_on_cpu(monkeypatch):
    """Run on the CPU the trials that are meant for a GPU."""
    problem_of = trial.problem_of
    monkeypatch.setattr(trial, "problem_of", lambda backend, device: problem_of(backend, torch.device("cpu")))


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


def test_a_gpu_without_the_cuda_kernels_though_nvcc_is_there_is_a_warning(only, monkeypatch, caplog):
    only("triton")
    monkeypatch.setattr(library, "cuda_errors", lambda: ["scan.cu(30): error: x is undefined"])
    with caplog.at_level(logging.INFO, logger="model.lib_mamba.backends"):
        assert backends.choose("cuda").name == "triton"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


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
    monkeypatch.setattr(trial, "problem_of", lambda backend, device: "an illegal memory access was encountered")
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
    assert trial.problem_of(backends._load(name), torch.device("cpu")) == ""


def test_a_forced_backend_that_is_missing_is_an_error_that_tells_the_way_out(monkeypatch):
    monkeypatch.setattr(library, "PACKAGE", "mobilemamba_kernels_of_nobody")
    with pytest.raises(
        ValueError, match=r"'cpu' was asked for but cannot run: .* is not installed \(pip install .*selective_scan"
    ):
        backends.set_backend("cpu")
    with pytest.raises(ValueError, match="'cuda' was asked for"):
        create_model("MobileMamba_T2", scan_backend="cuda")
    with pytest.raises(ValueError, match="must be one of cuda, triton, cpu, reference, got 'gpu'"):
        create_model("MobileMamba_T2", scan_backend="gpu")
    assert backends.choose("cpu").name == "reference"


def test_a_forced_backend_serves_only_its_devices(only):
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


def test_a_call_that_a_backend_does_not_cover_runs_on_the_reference_and_is_logged(only, caplog):
    fakes = only("cpu")
    fakes["cpu"].gated_scan = lambda *arguments: NotImplemented
    with caplog.at_level(logging.INFO, logger="model.lib_mamba.backends"):
        assert scan_once().isfinite().all()
    assert "does not cover" in caplog.messages[-1]


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
