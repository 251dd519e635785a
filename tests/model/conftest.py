"""What the tests of the compiled layers share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.lib_mamba import backends, use_backend

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"default": "portable", "avx2": "AVX2", "avx512": "AVX-512"}


@pytest.fixture
def compiled_kernels():
    """The operators of the compiled library in use, what they allocate filled with NaN."""
    is_available, reason = backends.availability("cpu")
    if not is_available:
        pytest.skip(reason)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with use_backend("cpu"):
        yield torch.ops.mobilemamba_kernels
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run_with_capability(compiled_kernels):
    """Run code with the kernels of an instruction set: PyTorch's switch, which they follow, is read once a process."""

    def run(capability: str, code: str) -> str:
        widest = torch.backends.cpu.get_cpu_capability().lower()
        if {"avx2": widest not in ("avx2", "avx512"), "avx512": widest != "avx512"}.get(capability, False):
            pytest.skip(f"PyTorch uses {widest} here")
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2"}
        code += "\nprint(torch.ops.mobilemamba_kernels.cpu_capability())"
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        *output, name = result.stdout.splitlines()
        assert name == NAMES[capability]
        return "\n".join(output)

    return run
