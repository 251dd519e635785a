"""Clocks at every layer of a network: which part a layer belongs to, how long it takes by itself, what it returns."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .lib_mamba import SS2D
from .mobilemamba.folded_layers import (
    FoldedConvs,
    FoldedDepthwise,
    FoldedFFN,
    FoldedLinear,
    FoldedMixer,
    FoldedPointwise,
    FoldedSqueezeExcite,
)
from .mobilemamba.wavelet import WTEMamba

__all__ = ["Clock", "Ledger", "Place", "find_parts", "new_bytes"]

Place = tuple[str, str]  # stage and kind

# Layers that are of one kind with all that is in them, as one compiled operator may compute it.
WHOLES: dict[type[nn.Module], str] = {
    FoldedFFN: "depthwise and feed-forward",
    FoldedMixer: "mixer",
    FoldedConvs: "convolution",
    FoldedDepthwise: "depthwise convolution",
    FoldedPointwise: "pointwise convolution",
    FoldedSqueezeExcite: "squeeze-excite",
    FoldedLinear: "linear",
}
# What a module with layers in it does between these.
OWN: dict[type[nn.Module], str] = {SS2D: "scan", WTEMamba: "wavelet transform"}
BETWEEN, BETWEEN_STAGES = "between layers", "between stages"


def find_parts(network: nn.Module) -> dict[str, Place]:
    """Return the stage and the kind of every module of a network, by its name.

    Stages are the modules that a network's ``feature_info`` names, then those at its top.
    """
    infos = getattr(network, "feature_info", None) or ()
    stages = [str(info["module"]) for info in infos if isinstance(info, Mapping) and info.get("module")]
    places: dict[str, Place] = {}
    whole, whole_kind = "", ""
    for name, module in network.named_modules():
        if whole and not f"{name}.".startswith(f"{whole}."):
            whole = ""
        if not whole and type(module) in WHOLES:
            whole, whole_kind = name, WHOLES[type(module)]
        places[name] = (_stage(name, stages), whole_kind if whole else _kind(module))
    return places


def _stage(name: str, stages: list[str]) -> str:
    around = [stage for stage in stages if f"{name}.".startswith(f"{stage}.")]
    return max(around, key=len) if around else name.partition(".")[0] or BETWEEN_STAGES


def _kind(module: nn.Module) -> str:
    for kind, name in OWN.items():
        if isinstance(module, kind):
            return name
    if isinstance(module, nn.modules.conv._ConvNd):
        is_depthwise = module.groups > 1 and module.groups == module.in_channels
        is_pointwise = set(module.kernel_size) == {1}
        return f"{'depthwise ' if is_depthwise else 'pointwise ' if is_pointwise else ''}convolution"
    if next(module.children(), None) is not None:
        return BETWEEN
    name = type(module).__name__.lower()
    kinds = {"norm": "normalisation", "linear": "linear", "pool": "pooling"}
    return next((kind for sign, kind in kinds.items() if sign in name), "activation and others")


class Clock:
    """Reads the time on a device.

    Args:
        device: A GPU's own clock is read, which waits for nothing; the host's elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def now(self) -> Any:
        """Return a moment."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Return the seconds between two moments."""
        return start.elapsed_time(end) / 1e3 if self.is_cuda else end - start

    def wait(self) -> None:
        """Wait until all moments have been."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def measure(self, network: nn.Module, images: Tensor) -> float:
        """Return the seconds of one pass that is left alone."""
        start = self.now()
        network(images)
        end = self.now()
        self.wait()
        return self.between(start, end)


class Ledger:
    """Notes, while it is entered, when each module of a network begins and ends.

    Args:
        network: The network.
        places: Of its modules, from `find_parts`.
        clock: Reads the time.
        has_ranges: Also name each module to torch.profiler.
    """

    def __init__(
        self, network: nn.Module, places: Mapping[str, Place], clock: Clock, *, has_ranges: bool = False
    ) -> None:
        self.network = network
        self.places = places
        self.clock = clock
        self.has_ranges = has_ranges
        self._moments: list[tuple[Place | None, Any]] = []  # the end of a module where there is no place
        self._hooks: list[Any] = []
        self._ranges: list[Any] = []

    def __enter__(self) -> Ledger:
        for name, module in self.network.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._enter(name, module)))
            self._hooks.append(module.register_forward_hook(self._leave))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, name: str, module: nn.Module) -> Any:
        place = self.places[name]
        title = f"{name or 'network'} ({type(module).__name__})"

        def enter(*_: Any) -> None:
            if self.has_ranges:
                self._ranges.append(torch.profiler.record_function(title))
                self._ranges[-1].__enter__()
            self._moments.append((place, self.clock.now()))

        return enter

    def _leave(self, *_: Any) -> None:
        self._moments.append((None, self.clock.now()))
        if self.has_ranges:
            self._ranges.pop().__exit__(None, None, None)

    def seconds(self) -> dict[Place, float]:
        """Return the time of each part: a module's own, from one moment to the next while it is the innermost."""
        self.clock.wait()
        seconds: dict[Place, float] = defaultdict(float)
        open_places: list[Place] = []
        before = None
        for place, moment in self._moments:
            if open_places:
                seconds[open_places[-1]] += self.clock.between(before, moment)
            if place is None:
                open_places.pop()
            else:
                open_places.append(place)
            before = moment
        return dict(seconds)


def new_bytes(network: nn.Module, images: Tensor) -> dict[str, int]:
    """Return the bytes of the maps in one pass by the module that made them: what goes into or comes out of a layer.

    A map counts once, also where several layers return it or change it in place. What only one compiled operator sees
    is none.
    """
    kept: list[Tensor] = [images]  # so that no address comes twice
    known = {images.untyped_storage().data_ptr()}
    counts: dict[str, int] = defaultdict(int)
    around: list[str] = []

    def note(name: str, values: Any) -> None:
        for value in values if isinstance(values, tuple | list) else (values,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                known.add(value.untyped_storage().data_ptr())
                kept.append(value)
                counts[name] += value.untyped_storage().nbytes()

    hooks = []
    for name, module in network.named_modules():

        def enter(_: nn.Module, inputs: Any, name: str = name) -> None:
            note(around[-1] if around else name, inputs)
            around.append(name)

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            note(around.pop(), output)

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(counts)
