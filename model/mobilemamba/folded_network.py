"""A folded network as one operator of the compiled CPU kernels, while it is what `fuse` made of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from operator import attrgetter, contains, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from ..layers import Activation
from .folded_layers import FoldedBlock, FoldedConvs, FoldedFFN, FoldedLinear, FoldedPatchMerging, Packed

__all__ = ["Arguments", "Plan"]

# What csrc/layers/network.cpp calls these layers.
_KINDS: dict[type[nn.Module], int] = {FoldedFFN: 0, FoldedBlock: 1, FoldedPatchMerging: 2}
_DEPTH = 3  # a stage, its layers, and what is within these: what is called where a layer is an operator


class Arguments(NamedTuple):
    """Of the operator, besides the images."""

    weights: list[Tensor]
    stem: list[int]
    layers: list[int]
    split: list[int]
    reverse: list[int]
    norm_eps: float


class Plan:
    """The operator's arguments, collected once: they are in many places, far from each other in memory.

    It is not copied or pickled with its network, but made again.

    Args:
        network: Folded.

    Attributes:
        arguments: None if there is a layer that the operator does not know.
    """

    def __init__(self, network: nn.Module) -> None:
        self.arguments = _collect(network)
        modules = list(network.modules())
        packed = [module for module in modules if isinstance(module, Packed)]
        called = list(_descendants(network, _DEPTH))
        self._called = called
        self._types = list(map(type, called))
        self._own = list(map(vars, called))
        self._hooks = [hooks for module in called for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._children = [module._modules for module in modules if module._modules]
        self._children_then = list(map(dict, self._children))
        self._packed = packed
        self._weights_then = list(map(_kernel_weights, packed))

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def is_current(self) -> bool:
        """Return whether all modules and weights are still those that it was made of."""
        return (
            self._children == self._children_then
            and list(map(type, self._called)) == self._types
            and all(map(is_, map(_kernel_weights, self._packed), self._weights_then))
        )

    def is_watched(self) -> bool:
        """Return whether a module is to be called for its hooks, or for a `forward` of its own."""
        return any(self._hooks) or any(map(contains, self._own, repeat("forward"))) or _has_global_hook()


_kernel_weights = attrgetter("kernel_weights")
_has_global_hook = torch_modules._has_any_global_hook


def _descendants(module: nn.Module, depth: int) -> Iterator[nn.Module]:
    for child in module.children():
        yield child
        if depth > 1:
            yield from _descendants(child, depth - 1)


def _collect(network: nn.Module) -> Arguments | None:
    """Return the arguments, or None where a layer is not one of those that `fuse` makes for these kernels."""
    stem, *stages, head = network.children()
    layers = [inner for stage in stages for layer in _inside(stage) for inner in _inside(layer)]
    if type(stem) is not FoldedConvs or stem.activations[-1] is not Activation.NONE or not all(map(_is_known, layers)):
        return None
    if type(head) not in (FoldedLinear, nn.Identity):
        return None
    weights = [*stem.kernel_weights]
    for layer in layers:
        weights += layer.kernel_weights()
    if type(head) is FoldedLinear:
        weights += head.kernel_weights
    settings = [layer.mixer.kernel_settings() for layer in layers if isinstance(layer, FoldedBlock)]
    common = {(tuple(reverse), eps) for _, reverse, eps in settings}
    if len(common) != 1 or any(weight is None or weight.dtype != torch.float32 for weight in weights):
        return None
    ((reverse, norm_eps),) = common
    kinds = [_KINDS[type(layer)] for layer in layers]
    split = [count for counts, _, _ in settings for count in counts]
    return Arguments(weights, [len(stem.panels), *map(int, stem.shape)], kinds, split, list(reverse), norm_eps)


def _inside(module: nn.Module) -> Iterable[Any]:
    return module if type(module) is nn.Sequential else [module]


def _is_known(layer: nn.Module) -> bool:
    if type(layer) not in _KINDS:
        return False
    return not isinstance(layer, FoldedBlock | FoldedPatchMerging) or layer.is_one_operator()
