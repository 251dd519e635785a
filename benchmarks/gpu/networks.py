"""Times of whole networks: throughput, latency, peers, their kernels one by one, their convolutions in both layouts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from .. import networks
from ..common import precision_context
from ..network import LAYOUTS
from .context import Cases, Context
from .scale import B1, B4, S6, T2

__all__ = ["Prepared", "convolutions", "latency", "more_networks", "peers", "profiles", "throughput"]

# Seconds an image on one H200: in bf16 at batch 256, and alone.
AIMS = {T2: 1 / 60_000, S6: 1 / 35_000, B1: 1 / 22_000, B4: 1 / 6_000}
LATENCY_AIMS = {T2: 0.5e-3}
# The fastest first, in case time runs out. Compiled networks keep the layout that the compiler gives them.
MODES = (
    ("channels_last", "compile+graph"),
    ("channels_last", "compile"),
    ("channels_last", "graph"),
    ("channels_last", "eager"),
    ("nchw", "graph"),
    ("nchw", "eager"),
)
NUM_KERNELS = 25
PROFILED_RUNS = 3


class Prepared:
    """A folded network with its input in place, for every mode.

    Args:
        context: Of the step.
        name: Of `benchmarks.networks.NAMES`.
        batch: Images at a time.
        precision: One of `benchmarks.common.PRECISIONS`.
    """

    def __init__(self, context: Context, name: str, batch: int, precision: str) -> None:
        self.context = context
        self.batch = batch
        self.precision = precision
        torch.manual_seed(0)
        candidate = networks.build(name, device=context.device)
        self.network = candidate.network
        size = context.scale.size or candidate.size
        self.image = torch.randn(batch, 3, size, size, device=context.device)
        if precision == "bf16":
            self.network, self.image = self.network.bfloat16(), self.image.bfloat16()
        self._compiled: Callable[[Tensor], Any] | None = None

    def run(self, layout: str, mode: str) -> Callable[[], Any]:
        """Return what runs the network once; modes are those of `benchmarks.network.Case`."""
        self.network.to(memory_format=LAYOUTS[layout])
        image = self.image.contiguous(memory_format=LAYOUTS[layout])
        call = self.compiled if "compile" in mode else self.network

        def run() -> Any:
            with torch.inference_mode(), precision_context(self.precision, self.context.device):
                return call(image)

        run()  # compiles; what fails, fails here
        return self.context.captured(run) if "graph" in mode else run

    @property
    def compiled(self) -> Callable[[Tensor], Any]:
        """The compiled network, compiled once."""
        if self._compiled is None:
            torch.compiler.reset()
            self._compiled = torch.compile(self.network, dynamic=False, backend=self.context.scale.compiler)
        return self._compiled


def _kept(context: Context) -> Callable[[str, int, str], Prepared]:
    """Return what prepares networks and keeps the last one."""
    return functools.lru_cache(maxsize=1)(functools.partial(Prepared, context))


def _time_cases(
    context: Context,
    names: Sequence[str],
    batch: int,
    *,
    precisions: Sequence[str] = ("bf16",),
    modes: Sequence[tuple[str, str]] = MODES,
    aims: dict[str, float] | None = None,
) -> Cases:
    prepare = _kept(context)
    for name, precision, (layout, mode) in itertools.product(names, precisions, modes):
        own = precision if context.is_cuda else "fp32"  # a CPU may have no arithmetic for another
        case = {"network": name, "batch": batch, "precision": precision, "layout": layout, "mode": mode}
        yield case, functools.partial(_time, context, prepare, (name, batch, own), layout, mode, (aims or {}).get(name))


def _time(
    context: Context,
    prepare: Callable[[str, int, str], Prepared],
    setting: tuple[str, int, str],
    layout: str,
    mode: str,
    aim: float | None,
) -> dict[str, Any]:
    context.empty_cache()
    prepared = prepare(*setting)
    measured = context.time({mode: prepared.run(layout, mode)}, context.scale.plan)
    seconds = measured.seconds[mode]
    return {
        "seconds": seconds,
        "images_per_s": prepared.batch / seconds,
        "precision": prepared.precision,
        "size": prepared.image.shape[-1],
        "peak_bytes": context.peak_bytes(),
        "gauges": measured.gauges,
        "aim_s": None if aim is None or context.settings.is_small else aim * prepared.batch,
    }


def throughput(context: Context) -> Cases:
    """Time the most wanted networks at the full batch in every mode, in bf16."""
    return _time_cases(context, context.scale.networks, context.scale.batch, aims=AIMS)


def latency(context: Context) -> Cases:
    """Time one image."""
    modes = [mode for mode in MODES if mode[0] == "channels_last"]
    return _time_cases(context, context.scale.few_networks, 1, modes=modes, aims=LATENCY_AIMS)


def peers(context: Context) -> Cases:
    """Time other networks as ours are timed."""
    modes = (("channels_last", "compile+graph"), ("channels_last", "graph"), ("nchw", "graph"))
    return _time_cases(context, context.scale.peers, context.scale.batch, modes=modes)


def more_networks(context: Context) -> Cases:
    """Time the other variants, and some in other number formats."""
    batch, fastest = context.scale.batch, MODES[:1]
    yield from _time_cases(context, context.scale.more_networks, batch, modes=fastest)
    yield from _time_cases(context, context.scale.few_networks, batch, precisions=("amp", "fp32"), modes=fastest)


def profiles(context: Context) -> Cases:
    """List the kernels that take longest in a forward pass: two networks, eager and compiled."""
    prepare = _kept(context)
    names = [name for name in (T2, B4) if name in context.scale.networks]
    for name, mode in itertools.product(names, ("eager", "compile")):
        precision = "bf16" if context.is_cuda else "fp32"
        setting = (name, context.scale.batch, precision)
        yield {"network": name, "mode": mode}, functools.partial(_profile, context, prepare, setting, mode)


def _profile(
    context: Context, prepare: Callable[[str, int, str], Prepared], setting: tuple[str, int, str], mode: str
) -> dict[str, Any]:
    run = prepare(*setting).run("channels_last", mode)
    return kernels_of(run, context)


def kernels_of(run: Callable[[], Any], context: Context) -> dict[str, Any]:
    """Profile a call: its launches, the time on the device, and the kernels that take longest.

    On a CPU, PyTorch's operators stand in for kernels.
    """
    activity = ProfilerActivity.CUDA if context.is_cuda else ProfilerActivity.CPU
    kind, time = (DeviceType.CUDA, "device") if context.is_cuda else (DeviceType.CPU, "cpu")
    run()
    with profile(activities=[activity]) as profiled:
        for _ in range(PROFILED_RUNS):
            run()
        if context.is_cuda:
            torch.cuda.synchronize()
    events = [event for event in profiled.key_averages() if event.device_type == kind]
    seconds = {event.key: getattr(event, f"self_{time}_time_total") / 1e6 / PROFILED_RUNS for event in events}
    counts = {event.key: event.count / PROFILED_RUNS for event in events}
    longest = sorted(seconds, key=lambda key: -seconds[key])[:NUM_KERNELS]
    return {
        "launches": sum(counts.values()),
        "seconds": sum(seconds.values()),
        "kernels": [{"name": key, "count": counts[key], "seconds": seconds[key]} for key in longest],
    }


def convolutions(context: Context) -> Cases:
    """Time every convolution of a folded network in both memory layouts, each shape once."""
    for name in context.scale.few_networks:
        for setting in _convolutions_of(context, name):
            yield {"network": name, **setting}, functools.partial(_time_convolution, context, setting)


class _Convolutions(TorchDispatchMode):
    """Notes the settings of the convolutions that run, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: list[dict[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note a convolution, and run it."""
        if func is torch.ops.aten.convolution.default and not args[6]:  # transposed ones are left out
            x, weight, _, stride, padding, *_, groups = args
            setting = {"in": x.shape[1], "out": weight.shape[0], "groups": groups, "kernel": weight.shape[-1]}
            setting |= {"stride": stride[0], "padding": padding[0], "side": x.shape[-1]}
            if setting not in self.settings:
                self.settings.append(setting)
        return func(*args, **(kwargs or {}))


def _convolutions_of(context: Context, name: str) -> list[dict[str, int]]:
    """Return the settings of the convolutions that a folded network runs, found without computing anything."""
    candidate = networks.build(name)
    size = context.scale.size or candidate.size
    with torch.no_grad(), _Convolutions() as found:  # in inference mode, conv2d would not come apart
        candidate.network.to("meta")(torch.empty(1, 3, size, size, device="meta"))
    return found.settings


def _time_convolution(context: Context, setting: dict[str, int]) -> dict[str, Any]:
    dtype = torch.bfloat16 if context.is_cuda else torch.float32
    kind: dict[str, Any] = {"device": context.device, "dtype": dtype}
    side, kernel = setting["side"], setting["kernel"]
    x = torch.randn(context.scale.batch, setting["in"], side, side, **kind)
    weight = torch.randn(setting["out"], setting["in"] // setting["groups"], kernel, kernel, **kind)
    options = {name: setting[name] for name in ("stride", "padding", "groups")}
    runs = {
        layout: functools.partial(
            torch.conv2d,
            x.contiguous(memory_format=memory_format),
            weight.contiguous(memory_format=memory_format),
            **options,
        )
        for layout, memory_format in LAYOUTS.items()
    }
    with torch.inference_mode():
        measured = context.time(runs, context.scale.short_plan)
    return {**{f"{layout}_s": seconds for layout, seconds in measured.seconds.items()}, "gauges": measured.gauges}
