"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scan_cases import arguments

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", int: "i32", float: "fp32"}
KERNELS = {
    "triton_forward": ["scan_kernel", "norm_gate_kernel"],
    "triton_backward": ["norm_gate_backward_kernel", "scan_backward_kernel"],
}


@pytest.mark.slow
def test_the_scan_in_the_interpreter():
    """The tests of the gated scan that are marked for it: Triton reads its switch when a kernel is defined."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreted", "-k", "triton"]
    done = subprocess.run(
        [*command, Path(__file__).with_name("test_model_gated_scan.py")],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout


@pytest.fixture
def launches(monkeypatch):
    """Collect what would be launched: kernel, arguments, options."""
    from model.lib_mamba.kernels import triton_backward, triton_forward

    launched = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append((self.kernel, arguments, options))

    for module in (triton_forward, triton_backward):
        for name in KERNELS[module.__name__.rpartition(".")[2]]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
    return launched


def compile_launch(kernel, arguments, options, capability):
    """Compile a kernel as a launch would have it; return its machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    names = kernel.arg_names
    constants = {name: value for name, value in options.items() if name in names}
    types = {
        name: TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)]
        for name, value in zip(names, arguments, strict=False)
    }
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    others = {name: value for name, value in options.items() if name not in names}
    return compile_source(source, target=GPUTarget("cuda", capability, 32), options=others).asm["cubin"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="Triton interprets")
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        (90, torch.bfloat16),
        pytest.param(90, torch.float32, marks=pytest.mark.slow),
        pytest.param(90, torch.float16, marks=pytest.mark.slow),
        pytest.param(80, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(80, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_kernel_compiles_for_a_gpu(capability, dtype, launches, monkeypatch, tmp_path):
    """For a call of MobileMamba-T2, forward and backward."""
    from model.lib_mamba.kernels import triton_scan

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors = arguments(144, batch=1, channels=224, rank=7, dtype=dtype)
    triton_scan.gated_scan(*tensors, 1e-5, [0, 1])
    triton_scan.gated_scan_backward(tensors[0], *tensors, 1e-5, [0, 1])
    assert len(launches) == 6
    for kernel, own_arguments, options in launches:
        code = compile_launch(kernel, own_arguments, options, capability)
        assert code.startswith(b"\x7fELF"), kernel.__name__
