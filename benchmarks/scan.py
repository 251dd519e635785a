"""The core of the scan alone: every call of the six variants, and time against length.

    python -m benchmarks.scan [--quick] [--batch 1] [--precision fp32]

The core is what `model.lib_mamba.gated_scan` does: time step, both directions, merge, normalisation, gate. Every
backend that can run is measured beside the floor, which reads x and z and writes y once (3 * D * L elements: a
multiplication of the same tensors), and beside the same spelled out tensor by tensor. D channels, L positions, R rank.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import create_model, list_models
from model.lib_mamba import SS2D, backends, gated_scan, reference, use_backend

from .common import (
    Plan,
    add_arguments,
    describe_machine,
    main,
    measure,
    save_and_draw,
    set_up,
    speedup,
    summary_line,
    table,
)
from .literal import literal_core
from .parsers import new_parser

__all__ = ["Call", "calls_of", "core_arguments", "count_bytes", "literal_arguments", "parse", "run"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTHS = (3, 9, 16, 36, 49, 64, 144, 196, 256, 576, 1024, 4000)
QUICK_LENGTHS = (3, 36, 256, 1024, 4000)
QUICK_VARIANTS = ("MobileMamba_T2", "MobileMamba_B1")
LENGTH_CHANNELS, LENGTH_RANK = 320, 10
EPS, REVERSE = 1e-5, [0, 1]
FLOOR, LITERAL, REFERENCE = "floor", "literal", "reference"
KERNEL, NO_RANK = " kernel", " kernel, R = 1"
# Calls take microseconds: many make a sample, and they are warm sooner than a network.
FULL = Plan(warmup=0.3, seconds=5.0, runs=50, turns=10, sample=1e-3)
QUICK = Plan(warmup=0.02, seconds=0.2, runs=6, turns=3, sample=5e-4)
# Forward: reads x, z, writes y. Backward: reads x, z and the gradient of y, writes those of x and z.
FLOOR_TENSORS = {"forward": 3, "backward": 5}
# Microseconds of all scans of one image in a first C version: fp32, one thread, AVX-512, without the product that
# gives the time steps. Measured on another day, so a scale more than a rival.
PROTOTYPE_US = {
    "MobileMamba_T2": 88,
    "MobileMamba_T4": 117,
    "MobileMamba_S6": 173,
    "MobileMamba_B1": 364,
    "MobileMamba_B2": 814,
    "MobileMamba_B4": 1445,
}


@dataclass(frozen=True)
class Call:
    """The shape of one call of the scan.

    Attributes:
        channels: D.
        length: L.
        rank: R.
    """

    channels: int
    length: int
    rank: int


def calls_of(variant: str) -> Counter[Call]:
    """Return the calls that a variant makes for one image at its own size, with how often it makes each."""
    calls: Counter[Call] = Counter()

    def note(module: SS2D, inputs: tuple[Tensor]) -> None:
        height, width = inputs[0].shape[2:]
        _, channels, rank = module.dt_projs_weight.shape
        calls[Call(channels, height * width, rank)] += 1

    with torch.device("meta"):
        network = create_model(variant).eval()
        for module in network.modules():
            if isinstance(module, SS2D):
                module.register_forward_pre_hook(note)
        network(torch.empty(1, 3, network.img_size, network.img_size))
    return calls


def core_arguments(call: Call, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return the tensors of `gated_scan` for a call; z is part of a wider tensor, as in the network."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    inner, length, rank = call.channels, call.length, call.rank
    x = normal(batch, length, inner)
    projected = normal(batch, length, 2 * inner)
    projection = normal(batch, length, 2 * (rank + 2))
    x, projected, projection = (tensor.to(dtype) for tensor in (x, projected, projection))
    parameters = [
        0.1 * uniform(2, inner, rank),
        0.1 * uniform(2, inner),
        0.1 * normal(2 * inner, 1),
        torch.ones(2 * inner, device=device),
        torch.ones(inner, device=device),
        0.1 * normal(inner),
    ]
    return [x, projected[..., inner:], projection, *parameters]


def literal_arguments(arguments: Sequence[Tensor]) -> list[Tensor]:
    """Return the same call for `literal_core`: channels first, each direction's projection in its own order."""
    x, z, projection, *parameters = arguments
    maps = [tensor.transpose(1, 2).unsqueeze(2).contiguous() for tensor in (x, z)]
    forward, backward = projection.transpose(1, 2).chunk(2, dim=1)
    return [*maps, torch.stack([forward, backward.flip(-1)], dim=1), *parameters]


# Without an alias in their schema, though they touch no element.
_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"}


class _ByteCounter(TorchDispatchMode):
    """Adds up what every operation reads and writes; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count its tensors."""
        result = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and func._schema.name not in _ALLOCATIONS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def count_bytes(function: Callable[[], Any]) -> int:
    """Return the bytes that a function's operations read and write, each counted as if nothing stayed in a cache."""
    with _ByteCounter() as counter:
        function()
    return counter.num_bytes


@dataclass(frozen=True)
class Implementation:
    """A way to run the core.

    Attributes:
        function: Takes ``arguments``.
        arguments: Tensors.
        backend: What to force while it runs.
    """

    function: Callable[..., Tensor]
    arguments: list[Tensor]
    backend: str | None = None

    def forward(self) -> Callable[[], Tensor]:
        """Return what runs the forward pass, with nothing around it but what it needs: calls take microseconds."""
        call = functools.partial(self.function, *self.arguments)
        if self.backend is None:
            return call

        def run() -> Tensor:
            with use_backend(self.backend):
                return call()

        return run

    def backward(self) -> Callable[[], Any]:
        """Return what runs the backward pass alone."""
        leaves = [argument.detach().requires_grad_() for argument in self.arguments]
        with use_backend(self.backend):
            y = self.function(*leaves)
        grad = torch.randn_like(y)

        def run() -> Any:
            with use_backend(self.backend):
                return torch.autograd.grad(y, leaves, grad, retain_graph=True)

        return run


def available_backends(device: str) -> list[str]:
    """Return the backends that run on the device here, the reference last."""
    names = []
    for name in backends.NAMES:
        if backends.availability(name)[0]:
            with use_backend(name):
                names += [name] if backends.choose(device).name == name else []
    return names


def _kernel(name: str, device: str) -> Callable[..., Tensor]:
    """Return a backend's function, without the operator around it."""
    with use_backend(name):
        function = backends.choose(device).backend.gated_scan
    return lambda *arguments: function(*arguments, EPS, REVERSE)


def implementations(
    call: Call, arguments: argparse.Namespace, tensors: list[Tensor], *, is_forward: bool
) -> dict[str, Implementation]:
    """Return what to measure for one call, by name. Kernels alone have no backward pass that can be called."""
    found = {}
    for name in available_backends(arguments.device):
        found[name] = Implementation(gated_scan, tensors, name)
        if is_forward and name != REFERENCE:
            kernel = _kernel(name, arguments.device)
            found[name + KERNEL] = Implementation(kernel, tensors)
            found[name + NO_RANK] = Implementation(kernel, _tensors(replace(call, rank=1), arguments))
    found[LITERAL] = Implementation(literal_core, literal_arguments(tensors))
    return found


def _tensors(call: Call, arguments: argparse.Namespace) -> list[Tensor]:
    return core_arguments(call, arguments.batch, DTYPES[arguments.precision], arguments.device)


def _floor(x: Tensor, z: Tensor) -> Callable[[], Tensor]:
    """Return what reads x and z and writes as much, once."""
    y = torch.empty_like(x)

    return functools.partial(torch.mul, x, z, out=y)


def _moved_bytes(name: str, tensors: list[Tensor], run: Callable[[], Any], *, is_forward: bool) -> int:
    """Return the bytes of a pass: of a kernel its operands, of what is made of several operations all of theirs."""
    if name != REFERENCE:
        return count_bytes(run)
    function = reference.gated_scan if is_forward else reference.gated_scan_backward
    grad = [] if is_forward else [torch.empty_like(tensors[0])]
    with torch.inference_mode():
        return count_bytes(lambda: function(*grad, *tensors, EPS, REVERSE))


def measure_call(call: Call, direction: str, arguments: argparse.Namespace, plan: Plan) -> list[dict[str, Any]]:
    """Measure all implementations of one call in turns; return a row for each, the floor first."""
    is_forward = direction == "forward"
    tensors = _tensors(call, arguments)
    num_elements = FLOOR_TENSORS[direction] * tensors[0].numel()
    moved = {FLOOR: num_elements * tensors[0].element_size()}
    runs: dict[str, Callable[[], Any]] = {FLOOR: _floor(*tensors[:2])}
    for name, implementation in implementations(call, arguments, tensors, is_forward=is_forward).items():
        runs[name] = implementation.forward() if is_forward else implementation.backward()
        moved[name] = _moved_bytes(name, tensors, runs[name], is_forward=is_forward)
    with torch.inference_mode(is_forward):
        timings = measure(runs, plan, arguments.device)
    scale = FLOOR_TENSORS[direction] / FLOOR_TENSORS["forward"]
    scaled = [[scale * sample for sample in turn] for turn in timings[FLOOR].turns]
    timings[FLOOR] = replace(timings[FLOOR], turns=scaled)
    return [
        {
            **vars(call),
            "batch": arguments.batch,
            "precision": arguments.precision,
            "threads": torch.get_num_threads(),
            "pass": direction,
            "implementation": name,
            "bytes": moved[name],
            "over_floor": speedup(timings[FLOOR], timing),
            **timing.as_dict(),
        }
        for name, timing in timings.items()
    ]


def totals(rows: Iterable[Mapping[str, Any]], counts: Mapping[str, Counter[Call]]) -> list[dict[str, Any]]:
    """Return the time of all scans of one image, per variant, pass, number of threads and implementation."""
    times = {
        (row["pass"], row["threads"], row["implementation"], Call(row["channels"], row["length"], row["rank"])): (
            row["median_s"] / row["batch"],
            row["bytes"] / row["batch"],
        )
        for row in rows
    }
    cases = list(dict.fromkeys(key[:3] for key in times))
    result = []
    for variant, calls in counts.items():
        for case in cases:
            seconds, num_bytes = (
                sum(count * times[(*case, call)][i] for call, count in calls.items()) for i in range(2)
            )
            direction, threads, implementation = case
            row = {"variant": variant, "pass": direction, "threads": threads, "implementation": implementation}
            row |= {"seconds": seconds, "bytes": num_bytes, "over_prototype": None}
            if direction == "forward" and threads == 1 and implementation != FLOOR:
                row["over_prototype"] = seconds * 1e6 / PROTOTYPE_US[variant]
            result.append(row)
    return result


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _print_calls(rows: Sequence[Mapping[str, Any]]) -> None:
    for direction, threads in dict.fromkeys((row["pass"], row["threads"]) for row in rows):
        print(f"\n{direction}, {threads} threads, batch {rows[0]['batch']}, {rows[0]['precision']}\n")
        cells = [
            (
                row["channels"],
                row["length"],
                row["rank"],
                row["implementation"],
                row["median_s"] * 1e6,
                row["bytes"] / 1e3,
                row["over_floor"],
            )
            for row in rows
            if (row["pass"], row["threads"]) == (direction, threads)
        ]
        print(table(cells, ("D", "L", "R", "implementation", "µs", "kB", "times the floor")))


def _print_totals(rows: Sequence[Mapping[str, Any]]) -> None:
    print("\nAll scans of one image\n")
    cells = [
        (
            row["variant"],
            row["pass"],
            row["threads"],
            row["implementation"],
            row["seconds"] * 1e6,
            row["bytes"] / 1e3,
            row["over_prototype"],
        )
        for row in rows
    ]
    print(table(cells, ("variant", "pass", "threads", "implementation", "µs", "kB", "times the prototype")))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and write the result and its picture; return the content of the result file."""
    plan = set_up(arguments, full=FULL, quick=QUICK)
    machine = describe_machine(arguments.device)
    print(summary_line(machine))
    counts = {variant: calls_of(variant) for variant in arguments.variants}
    shapes = list(dict.fromkeys(call for calls in counts.values() for call in calls))
    shapes_by_length = [Call(LENGTH_CHANNELS, length, LENGTH_RANK) for length in arguments.lengths]
    calls: list[dict[str, Any]] = []
    lengths: list[dict[str, Any]] = []
    for threads in dict.fromkeys((1, arguments.threads) if arguments.device == "cpu" else (arguments.threads,)):
        with _threads(threads):
            for direction in arguments.passes:
                for rows, group in ((calls, shapes), (lengths, shapes_by_length)):
                    for call in group:
                        rows += measure_call(call, direction, arguments, plan)
    sums = totals(calls, counts)
    _print_calls(calls)
    _print_totals(sums)
    figures = {"totals": sums, "calls": calls, "lengths": lengths}
    return save_and_draw("scan", machine, arguments, plan, figures)


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments, with what is left to the device and to ``--quick`` filled in."""
    parser = new_parser("scan", __doc__)
    add_arguments(parser)
    parser.add_argument("--variants", nargs="+", choices=list_models(), help="whose calls to measure (default: all)")
    parser.add_argument("--lengths", nargs="+", type=int, help="L of the measurement of time against length")
    parser.add_argument("--passes", nargs="+", choices=list(FLOOR_TENSORS), default=list(FLOOR_TENSORS))
    parser.add_argument("--batch", type=int, help="images at a time (CPU: 1; GPU: 256)")
    parser.add_argument("--precision", choices=list(DTYPES), help="of x, z and the projection (CPU: fp32; GPU: bf16)")
    arguments = parser.parse_args(command_line)
    is_cpu = arguments.device == "cpu"
    arguments.variants = arguments.variants or list(QUICK_VARIANTS if arguments.quick else list_models())
    arguments.lengths = arguments.lengths or list(QUICK_LENGTHS if arguments.quick else LENGTHS)
    arguments.batch = arguments.batch or (1 if is_cpu else 256)
    arguments.precision = arguments.precision or ("fp32" if is_cpu else "bf16")
    return arguments


if __name__ == "__main__":
    main(parse, run)
