"""The exponential moving average of a network's weights and buffers.

BatchNorm's statistics are averaged with the weights, as in the published recipe (decay 0.9998); the averaged network
is then consistent in itself and needs no recalibration.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["WeightAverage", "unwrap_network"]


def unwrap_network(network: nn.Module) -> nn.Module:
    """Return the bare network inside ``DistributedDataParallel`` and ``torch.compile``, in either order."""
    while True:
        inner = network.module if isinstance(network, DistributedDataParallel) else getattr(network, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return network
        network = inner


class WeightAverage:
    """A full copy of a network that holds the running average of its weights and buffers.

    ``average = decay * average + (1 - decay) * current`` for floating-point tensors; integer buffers, such as
    BatchNorm's count of batches, are copied.

    Args:
        network: The network, on its device, wrapped or bare; the average starts at its present weights.
        decay: Share of the old average that an update keeps, from 0 to below 1.

    Attributes:
        network: The averaged network, in eval mode, without gradients; its state-dict names are the network's own.

    Raises:
        ValueError: The decay is out of range.
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"trainer.ema={decay}: the decay must be 0 or more and below 1; None means no average")
        self.decay = decay
        self.network = copy.deepcopy(unwrap_network(network)).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the network's present weights and buffers; called once after each optimiser step.

        Args:
            network: The network that the average was started from, wrapped or bare.

        Raises:
            ValueError: It is another network.
        """
        averages, currents = _tensors(self.network), _tensors(unwrap_network(network))
        if [tensor.shape for tensor in averages] != [tensor.shape for tensor in currents]:
            raise ValueError("the network is not the one that the average was started from: its tensors differ")
        for dtype, (group_averages, group_currents) in _grouped(averages, currents):
            if dtype.is_floating_point:
                torch._foreach_lerp_(group_averages, group_currents, 1.0 - self.decay)
            else:
                torch._foreach_copy_(group_averages, group_currents)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights and buffers under the network's own names."""
        return self.network.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Put the average back to a saved one; every name and shape must match."""
        self.network.load_state_dict(state_dict)


def _tensors(network: nn.Module) -> list[Tensor]:
    # Each shared tensor comes once, so that a tied weight is not averaged twice.
    return list(chain(network.parameters(), network.buffers()))


def _grouped(
    averages: list[Tensor], currents: list[Tensor]
) -> Iterator[tuple[torch.dtype, tuple[list[Tensor], list[Tensor]]]]:
    """Pair up the tensors by device and dtype, for which a foreach call is a single kernel on a GPU."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for average, current in zip(averages, currents, strict=True):
        pair = groups.setdefault((average.device, average.dtype), ([], []))
        pair[0].append(average)
        pair[1].append(current)
    for (_, dtype), pair in groups.items():
        yield dtype, pair
