"""BatchNorm over processes: shared statistics, made equal before a test, restored after a skipped step."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from util.distributed import Process

from .precision import import_apex

__all__ = ["StatisticsKeeper", "batch_norm_statistics", "convert_sync_batch_norm", "equalise_statistics"]


def convert_sync_batch_norm(network: nn.Module, kind: str, process: Process) -> nn.Module:
    """Return the network with BatchNorm over the batches of all processes.

    Args:
        network: On its device.
        kind: ``trainer.sync_BN``: none, native or apex.
        process: One process needs no conversion.

    Raises:
        ValueError: If the kind is not available here.
    """
    if kind == "apex":
        parallel = import_apex("apex.parallel", entry="trainer.sync_BN", native="native")
        return parallel.convert_syncbn_model(network)
    if kind == "none" or not process.is_distributed:
        return network
    if process.device.type == "cpu":
        raise ValueError(
            "trainer.sync_BN=native needs GPUs, PyTorch has no SyncBatchNorm for CPUs; use trainer.sync_BN=none "
            "(trainer.dist_BN=reduce averages the statistics before each test)"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def batch_norm_statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the running statistics and batch counts of every BatchNorm by name; the tensors themselves."""
    return {
        f"{name}.{key}": buffer
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for key, buffer in module.named_buffers(recurse=False)
    }


@torch.no_grad()
def equalise_statistics(network: nn.Module, kind: str, process: Process) -> None:
    """Make the running statistics the same on all processes; a collective.

    Args:
        network: The bare network; with several processes, changed in place.
        kind: ``trainer.dist_BN``: ``reduce`` takes the mean over processes, in double precision so that equal values
            stay exact; otherwise all get those of rank 0, which are the ones that are saved.
        process: This process.
    """
    statistics = [value for value in batch_norm_statistics(network).values() if value.is_floating_point()]
    if not process.is_distributed or not statistics:
        return
    flat = torch.cat([value.flatten() for value in statistics]).double()
    flat = process.sum_tensor(flat).div_(process.world_size) if kind == "reduce" else process.broadcast_tensor(flat)
    for value, new in zip(statistics, flat.split([value.numel() for value in statistics]), strict=True):
        value.copy_(new.view_as(value))


class StatisticsKeeper:
    """A copy of a network's BatchNorm statistics, to restore when the step whose forward pass changed them is skipped.

    Args:
        network: The bare network.
    """

    def __init__(self, network: nn.Module) -> None:
        self._current: dict[torch.dtype, list[torch.Tensor]] = {}
        for value in batch_norm_statistics(network).values():
            self._current.setdefault(value.dtype, []).append(value)
        # Side by side in memory, so that `restore_if` chooses among all with one operation.
        self._flat = {dtype: _flatten(values) for dtype, values in self._current.items()}
        self._kept = {dtype: _split(self._flat[dtype], values) for dtype, values in self._current.items()}

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the present statistics."""
        for dtype, values in self._current.items():
            torch._foreach_copy_(self._kept[dtype], values)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the copy."""
        for dtype, values in self._current.items():
            torch._foreach_copy_(values, self._kept[dtype])

    @torch.no_grad()
    def restore_if(self, is_skipped: torch.Tensor) -> None:
        """Restore the copy where a scalar on the device is true, without waiting for the device."""
        for dtype, values in self._current.items():
            chosen = torch.where(is_skipped, self._flat[dtype], _flatten(values))
            torch._foreach_copy_(values, _split(chosen, values))


def _flatten(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in values])


def _split(flat: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return views of a flat tensor with the shapes of others."""
    parts = flat.split([value.numel() for value in like])
    return [part.view(value.shape) for part, value in zip(parts, like, strict=True)]
