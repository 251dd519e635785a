"""Multiply-accumulates of a network, counted by fvcore with a handle for the selective scan."""

from __future__ import annotations

from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

__all__ = ["count_macs", "gated_scan_macs", "scan_macs"]


def scan_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Return the operations of one `mobilemamba::selective_scan`, as the literature counts them.

    Per direction, position and channel: 9 for each state component (decay, input, recurrence, output), 1 for the
    skip term and R for the low-rank time step, which the operator contains.

    Args:
        inputs: Traced arguments x (B, L, D), projection, dt_weight (K, D, R), dt_bias, A_log (K * D, N), ...
        outputs: Unused; fvcore's signature.
    """
    batch, length, channels = inputs[0].type().sizes()
    num_directions, _, rank = inputs[2].type().sizes()
    num_states = inputs[4].type().sizes()[1]
    return batch * length * num_directions * channels * (9 * num_states + 1 + rank)


def gated_scan_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Return the operations of one `mobilemamba::gated_scan`: the scan's, and 5 for the normalisation.

    Args:
        inputs: Traced arguments x (B, L, D), z, and then those of the scan.
        outputs: Unused; fvcore's signature.
    """
    x, _, *scan = inputs
    batch, length, channels = x.type().sizes()
    return scan_macs([x, *scan], outputs) + 5 * batch * length * channels


@torch.no_grad()
def count_macs(network: nn.Module, size: int | tuple[int, int], *, in_chans: int = 3) -> int:
    """Return the multiply-accumulates of one image, as published tables of FLOPs count them.

    Args:
        network: Any module from images to anything; put into evaluation mode for the count and back.
        size: Side of the square input, or height and width, in pixels.
        in_chans: Channels of the input.
    """
    height, width = (size, size) if isinstance(size, int) else size
    parameter = next(network.parameters())
    image = torch.zeros(1, in_chans, height, width, dtype=parameter.dtype, device=parameter.device)
    was_training = network.training
    analysis = FlopCountAnalysis(network.eval(), image)
    analysis.set_op_handle("mobilemamba::selective_scan", scan_macs)
    analysis.set_op_handle("mobilemamba::gated_scan", gated_scan_macs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    total = int(analysis.total())
    network.train(was_training)
    return total
