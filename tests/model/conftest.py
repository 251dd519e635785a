"""Fixtures for the compiled layers, in this process and with the kernels of a chosen instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.lib_mamba import backends, cpu_layers, use_backend

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTION_SETS = {"default": "portable", "avx2": "AVX2", "avx512": "AVX-512"}


@pytest.fixture
def poisoned_memory():
    """Let PyTorch fill every uninitialised tensor with NaN, those that the kernels allocate too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def restored_threads():
    """Put the number of PyTorch's threads back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def require_backend():
    """Skip a test where a backend cannot run, and say why."""

    def require(name: str) -> None:
        is_available, reason = backends.availability(name)
        if not is_available:
            pytest.skip(reason)

    return require


@pytest.fixture
def compiled_kernels(require_backend, poisoned_memory):
    """The operators of the compiled library in use, what they allocate filled with NaN."""
    require_backend("cpu")
    torch.manual_seed(0)
    with use_backend("cpu"):
        yield torch.ops.mobilemamba_kernels


@pytest.fixture
def inference_kernels(compiled_kernels):
    """The same in inference mode, as the layers of a folded network run."""
    with torch.inference_mode():
        yield compiled_kernels


@pytest.fixture
def pretend_slow_bfloat16(monkeypatch):
    """Make this a processor on which bfloat16 is slower than float32, or one on which it is not."""

    def pretend(is_slow: bool) -> None:
        monkeypatch.setattr(cpu_layers, "_is_slow_in_bfloat16", lambda: is_slow)

    return pretend


@pytest.fixture
def run_with_capability(require_backend):
    """Run code with the kernels of an instruction set: PyTorch's switch, which they follow, is read once a process."""

    def run(capability: str, code: str) -> str:
        require_backend("cpu")
        widest = torch.backends.cpu.get_cpu_capability().lower()
        if {"avx2": widest not in ("avx2", "avx512"), "avx512": widest != "avx512"}.get(capability, False):
            pytest.skip(f"PyTorch uses {widest} here")
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2"}
        code += "\nprint(torch.ops.mobilemamba_kernels.cpu_capability())"
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        *output, name = result.stdout.splitlines()
        assert name == INSTRUCTION_SETS[capability]
        return "\n".join(output)

    return run
