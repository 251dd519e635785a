"""What a report checks before it times anything: the scan at every production shape, its operator, released logits."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import create_model
from model.lib_mamba import SS2D, backends, gated_scan, use_backend
from model.lib_mamba.trial import TOLERANCES, relative_error, synthetic_inputs

from .. import scan
from .context import Cases, Context

__all__ = ["compare_scan", "exactness", "operators", "parity", "production_calls", "value_and_gradients"]

NAMES = ("x", "z", "projection", "dt_weight", "dt_bias", "A_log", "D_skip", "norm_weight", "norm_bias")
NUM_SEQUENCES = 3  # the first of them, which have an entry for every image
SLICE_ELEMENTS = 2**24  # of a tensor in float64
LOGITS_TOLERANCE = 1e-4
PARITY = Path(__file__).resolve().parents[2] / "tests" / "parity"


def production_calls(networks: Sequence[str]) -> list[scan.Call]:
    """Return every call of the scan that these variants make, each once."""
    return list(dict.fromkeys(call for name in networks for call in scan.calls_of(name)))


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Let PyTorch fill every uninitialised tensor with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def exactness(context: Context) -> Cases:
    """Compare the scan with float64 at every production shape: output, nine gradients, and a second run bit for bit."""
    scale = context.scale
    calls = production_calls([*scale.networks, *scale.more_networks])
    for batch, precision, call in itertools.product(scale.checked_batches, scale.precisions, calls):
        case = {"D": call.channels, "L": call.length, "R": call.rank, "batch": batch, "precision": precision}
        yield case, functools.partial(compare_scan, call, batch, scan.DTYPES[precision], context.device)


def compare_scan(call: scan.Call, batch: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Run the chosen backend twice, in poisoned memory and in what the first run left, and the reference in float64.

    Returns:
        The largest errors relative to the largest exact values: of y, of y in inference mode, and of each gradient.
    """
    tensors = scan.core_arguments(call, batch, dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    grad = torch.randn(tensors[0].shape, generator=generator, device=device).to(dtype)
    with _poisoned_memory():
        actual = value_and_gradients(tensors, grad)
    again = value_and_gradients(tensors, grad)
    is_same = all(torch.equal(one, other) for one, other in zip(actual, again, strict=True))
    del again
    with torch.inference_mode(), _poisoned_memory():
        inferred = gated_scan(*tensors)
    errors = _errors([inferred, *actual], tensors, grad)
    tolerance = TOLERANCES[dtype]
    is_exact = all(errors[name] <= tolerance.output for name in ("y", "y in inference"))
    is_exact = is_exact and all(errors[name] <= tolerance.gradients for name in NAMES)
    chosen = backends.choose(device).name
    return {"backend": chosen, "errors": errors, "repeats": is_same, "passed": is_exact and is_same}


def value_and_gradients(tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Return y, and the gradients of the nine inputs for that of y."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    y = gated_scan(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def _errors(actual: list[Tensor], tensors: Sequence[Tensor], grad: Tensor) -> dict[str, float]:
    """Return the errors by name; the reference runs on some images at a time, to bound its memory.

    Args:
        actual: y in inference mode, y, and the gradients.
        tensors: The inputs.
        grad: Gradient of y.
    """
    inferred, y, *gradients = actual
    batch, length, channels = y.shape
    step = max(1, SLICE_ELEMENTS // (length * channels))
    largest = {name: [0.0, 0.0] for name in ("y", "y in inference", *NAMES)}  # error, exact value
    totals: list[Tensor] = []

    def note(name: str, own: Tensor, exact: Tensor) -> None:
        error, value = (own.double() - exact).abs().max().item(), exact.abs().max().item()
        is_worse = not error <= largest[name][0]  # NaN is the worst
        largest[name] = [error if is_worse else largest[name][0], max(value, largest[name][1])]

    for start in range(0, batch, step):
        part = slice(start, start + step)
        sequences = [tensor[part].double() for tensor in tensors[:NUM_SEQUENCES]]
        parameters = [tensor.double() for tensor in tensors[NUM_SEQUENCES:]]
        with use_backend(backends.REFERENCE):
            exact_y, *exact = value_and_gradients([*sequences, *parameters], grad[part].double())
        note("y", y[part], exact_y)
        note("y in inference", inferred[part], exact_y)
        for name, own, value in zip(NAMES[:NUM_SEQUENCES], gradients, exact, strict=False):
            note(name, own[part], value)
        sums = exact[NUM_SEQUENCES:]
        totals = [total + own for total, own in zip(totals, sums, strict=True)] if totals else sums
    for name, own, value in zip(NAMES[NUM_SEQUENCES:], gradients[NUM_SEQUENCES:], totals, strict=True):
        note(name, own, value)
    # For a single step A has no gradient: there, and only there, zero is compared with zero.
    return {name: error / value if value else error for name, (error, value) in largest.items()}


def operators(context: Context) -> Cases:
    """Run opcheck, torch.compile without graph breaks, and a CUDA graph, on the chosen backend."""
    checks: dict[str, Callable[[Context], str]] = {
        "opcheck": _opcheck,
        "torch.compile(fullgraph=True)": _compile,
        "CUDA graph": _graph,
    }
    for name, check in checks.items():
        yield {"check": name}, functools.partial(_verdict, check, context)
    yield from parity(context)


def _verdict(check: Callable[[Context], str], context: Context) -> dict[str, Any]:
    problem = check(context)
    return {"problem": problem, "passed": not problem}


def _opcheck(context: Context) -> str:
    tensors = synthetic_inputs(torch.float32, context.device)
    inputs = tuple(tensor.requires_grad_() for tensor in tensors)
    torch.library.opcheck(torch.ops.mobilemamba.gated_scan.default, (*inputs, scan.EPS, scan.REVERSE))
    return ""


def _compile(context: Context) -> str:
    torch.compiler.reset()
    module, x = _layer(context.device)
    compiled = torch.compile(module, fullgraph=True, backend=context.scale.compiler)
    expected = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    actual = torch.autograd.grad(compiled(x).square().sum(), [x, *module.parameters()])
    return _difference(actual, expected)


def _graph(context: Context) -> str:
    module, x = _layer(context.device)

    def run() -> Tensor:
        with torch.no_grad():
            return module(x)

    replay = context.captured(run)
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


def parity(context: Context) -> Cases:
    """Compare logits with the released network's own, in float32 proper, plain and folded."""
    for name, is_fused in itertools.product(context.scale.parity_cases, (False, True)):
        case = {"check": "released logits", "network": name, "is_fused": is_fused}
        yield case, functools.partial(_logits, context.device, name, is_fused=is_fused)


def _logits(device: str, name: str, *, is_fused: bool) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("parity_fill", PARITY / "fill.py")
    assert spec
    assert spec.loader
    kit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kit)
    variant, shape, seed = name.split("_")
    image = kit.image(*map(int, shape.split("x")), int(seed.removeprefix("seed"))).to(device)
    expected = torch.from_numpy(np.load(PARITY / "model_eval.npz")[f"{name}_logits"]).to(device).double()
    model = kit.fill_(create_model(f"MobileMamba_{variant}")).eval().to(device)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            error = relative_error((model.fuse() if is_fused else model)(image), expected)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    return {"error": error, "passed": error < LOGITS_TOLERANCE}
