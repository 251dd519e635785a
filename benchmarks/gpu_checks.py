"""What `gpu_report` checks before it times anything: the scans' results, their operators, the released numbers.

Every check returns rows for a table, one of whose columns is "passed": None where there is nothing to pass.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import create_model
from model.lib_mamba import SS2D, backends, use_backend
from model.lib_mamba.info import output_and_gradients
from model.lib_mamba.trial import TOLERANCES, problem_of, relative_error, synthetic_inputs

from . import network

__all__ = ["backends_found", "exactness", "operators", "parity", "repeatability"]

Row = dict[str, Any]

LOGITS_TOLERANCE = 1e-4
EPS, REVERSE = 1e-5, [0, 1]
PARITY = Path(__file__).resolve().parent.parent / "tests" / "parity"
PARITY_CASES = ("T2_1x160x224_seed1", "B1_1x256x256_seed0")


def backends_found(device: str, names: Sequence[str]) -> list[Row]:
    """Return what is known of backends: whether they can run, and what is wrong with one that cannot be trusted."""
    rows = []
    for name in names:
        is_available, detail = backends.availability(name)
        if not backends.serves(name, device):
            continue
        problem = problem_of(backends._load(name), torch.device(device)) if is_available else ""
        rows.append({"backend": name, "detail": problem or detail, "passed": not problem if is_available else None})
    return rows


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Let PyTorch fill every uninitialised tensor with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def exactness(device: str, names: Sequence[str], lengths: Sequence[int]) -> list[Row]:
    """Compare output and all gradients with float64, for every backend, type and length, batches of 5 and 1.

    Batches of 1 and float16, as bfloat16 in all but its conversions, are seen at every third length: Triton compiles
    kernels for each.
    """
    rows = []
    for dtype, (tolerance, gradient_tolerance) in TOLERANCES.items():
        for batch, channels in ((5, 37), (1, 224)):
            is_full = batch > 1 and dtype != torch.float16
            for length in lengths if is_full else lengths[::3]:
                tensors = synthetic_inputs(dtype, device, batch=batch, length=length, channels=channels, rank=7)
                with use_backend(backends.REFERENCE):
                    exact = output_and_gradients([tensor.double() for tensor in tensors])
                for name in names:
                    with use_backend(name), _poisoned_memory():
                        actual = output_and_gradients(tensors)
                    errors = [relative_error(*pair) for pair in zip(actual, exact, strict=True)]
                    # For a single step A has no gradient: what is compared is zero with zero.
                    gradients = [error for error, own in zip(errors, exact, strict=True) if own.abs().max() > 0][1:]
                    rows.append(
                        {
                            "backend": name,
                            "type": str(dtype).removeprefix("torch."),
                            "batch": batch,
                            "D": channels,
                            "L": length,
                            "error of y": errors[0],
                            "of gradients": max(gradients),
                            "passed": errors[0] <= tolerance and all(own <= gradient_tolerance for own in gradients),
                        }
                    )
    return rows


def repeatability(device: str, names: Sequence[str], lengths: Sequence[int]) -> list[Row]:
    """Compare three runs bit for bit."""
    rows = []
    for name in names:
        for dtype in TOLERANCES:
            is_same = True
            for length in lengths:
                tensors = synthetic_inputs(dtype, device, batch=5, length=length, channels=96)
                with use_backend(name):
                    first, *others = (output_and_gradients(tensors) for _ in range(3))
                pairs = (pair for other in others for pair in zip(first, other, strict=True))
                is_same = is_same and all(torch.equal(*pair) for pair in pairs)
            kind = str(dtype).removeprefix("torch.")
            rows.append({"backend": name, "type": kind, "lengths": len(lengths), "passed": is_same})
    return rows


def operators(device: str, names: Sequence[str]) -> list[Row]:
    """Run opcheck, torch.compile without graph breaks and, on a GPU, a CUDA graph."""
    checks: dict[str, Callable[[str], str]] = {"opcheck": _opcheck, "torch.compile": _compile}
    if device == "cuda":
        checks["CUDA graph"] = _graph
    rows = []
    for name in names:
        for check, run in checks.items():
            with use_backend(name):
                try:
                    problem = run(device)
                except Exception as error:  # a row of the table, like what else is wrong
                    problem = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append({"backend": name, "check": check, "problem": problem, "passed": not problem})
    return rows


def _opcheck(device: str) -> str:
    tensors = synthetic_inputs(torch.float32, device)
    inputs = tuple(tensor.requires_grad_() for tensor in tensors)
    torch.library.opcheck(torch.ops.mobilemamba.gated_scan.default, (*inputs, EPS, REVERSE))
    return ""


def _compile(device: str) -> str:
    torch.compiler.reset()
    module, x = _layer(device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    expected = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    actual = torch.autograd.grad(compiled(x).square().sum(), [x, *module.parameters()])
    return _difference(actual, expected)


def _graph(device: str) -> str:
    module, x = _layer(device)

    def run() -> Tensor:
        with torch.no_grad():
            return module(x)

    replay = network._capture(run)
    replay()  # on the first input
    x.data.copy_(torch.randn_like(x))
    return _difference([replay()], [run()])


def _layer(device: str) -> tuple[SS2D, Tensor]:
    torch.manual_seed(0)
    module = SS2D(32).to(device)
    module.eval()
    return module, torch.randn(2, 32, 12, 12, device=device, requires_grad=True)


def _difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    errors = [relative_error(one, other.double()) for one, other in zip(actual, expected, strict=True)]
    return "" if all(error < 5e-3 for error in errors) else f"differs by {max(errors):.1e}"  # TF32, perhaps


def parity(device: str, names: Sequence[str], cases: Sequence[str] = PARITY_CASES) -> list[Row]:
    """Compare logits with the released network's own, in float32 proper."""
    spec = importlib.util.spec_from_file_location("parity_fill", PARITY / "fill.py")
    assert spec
    assert spec.loader
    kit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kit)
    arrays = np.load(PARITY / "model_eval.npz")
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    rows = []
    try:
        for case in cases:
            variant, shape, seed = case.split("_")
            image = kit.image(*map(int, shape.split("x")), int(seed.removeprefix("seed"))).to(device)
            expected = torch.from_numpy(arrays[f"{case}_logits"]).to(device).double()
            for name in names:
                model = kit.fill_(create_model(f"MobileMamba_{variant}")).eval().to(device)
                for is_fused in (False, True):
                    with use_backend(name), torch.no_grad():
                        error = relative_error((model.fuse() if is_fused else model)(image), expected)
                    row = {"backend": name, "case": case, "fused": str(is_fused), "error": error}
                    rows.append({**row, "passed": error < LOGITS_TOLERANCE})
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    return rows
