"""The exponential moving average of a network's weights and buffers, on timm's `ModelEmaV3`.

BatchNorm's statistics are averaged with the weights, as in the published recipe (decay 0.9998); the averaged network
is then consistent in itself and needs no recalibration.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from timm.utils import ModelEmaV3
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


class WeightAverage(ModelEmaV3):
    """A full copy of a network that holds the running average of its weights and buffers.

    ``average = decay * average + (1 - decay) * current`` for floating-point tensors; integer buffers, such as
    BatchNorm's count of batches, are copied. Called once after each optimiser step, ``update(network)`` takes in the
    present weights and buffers.

    Args:
        network: The network, on its device, wrapped or bare; the average starts at its present weights.
        decay: Share of the old average that an update keeps, above 0 and below 1.

    Attributes:
        module: The averaged network, in eval mode, without gradients; its state-dict names are the network's own.
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        super().__init__(unwrap_network(network), decay=decay)
        self.requires_grad_(False)

    def update_unless(self, network: nn.Module, is_skipped: Tensor) -> None:
        """Do as `update`, but change nothing where a scalar on the device is true, without waiting for the device.

        The network's tensors must be finite, and its counts those of before the skipped step.
        """
        share = (1.0 - self.decay) * (1.0 - is_skipped.float())
        with torch.no_grad():
            self._take_in(network, lambda averages, currents: _move(averages, currents, share))

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Average every tensor once, in its own format.

        timm's goes by the entries of the state dict, where a tied weight comes twice and would be averaged twice, and
        rounds bfloat16 at random.

        Raises:
            ValueError: It is another network than the one that the average was started from.
        """
        self._take_in(model, lambda averages, currents: torch._foreach_lerp_(averages, currents, 1.0 - decay))

    def _take_in(self, model: nn.Module, move: Callable[[list[Tensor], list[Tensor]], None]) -> None:
        """Move the averages of floating-point tensors towards the present ones, and copy the others."""
        averages, currents = _tensors(self.module), _tensors(unwrap_network(model))
        if [tensor.shape for tensor in averages] != [tensor.shape for tensor in currents]:
            raise ValueError("the network is not the one that the average was started from: its tensors differ")
        pairs = list(zip(averages, currents, strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        if floating:
            move(*map(list, zip(*floating, strict=True)))
        if counts:
            torch._foreach_copy_(*map(list, zip(*counts, strict=True)))


def _move(averages: list[Tensor], currents: list[Tensor], share: Tensor) -> None:
    """Move averages by a share, a scalar on the device, of the way to the present tensors."""
    ways = torch._foreach_sub(currents, averages)
    torch._foreach_mul_(ways, share)
    torch._foreach_add_(averages, ways)


def _tensors(network: nn.Module) -> list[Tensor]:
    return list(chain(network.parameters(), network.buffers()))
