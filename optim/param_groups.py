"""Groups of the trained parameters, with their weight decay and their share of the learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

__all__ = ["no_decay_names", "parameter_groups"]


def no_decay_names(network: nn.Module) -> list[str]:
    """Return the names of the trained parameters without weight decay.

    These are the 1-D ones, the biases and those that the network itself lists. A bias is what is named so, whatever
    its shape: the scan's ``dt_projs_bias`` has a row per direction.
    """
    listed = network.no_weight_decay() if hasattr(network, "no_weight_decay") else set()
    return [
        name
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
        and (parameter.ndim <= 1 or name.rpartition(".")[2].endswith("bias") or _is_listed(name, listed))
    ]


def _is_listed(name: str, listed: Iterable[str]) -> bool:
    """Return whether a name is one of those listed; timm's networks list patterns, too."""
    return any(fnmatch(name, pattern) for pattern in listed)


def parameter_groups(
    network: nn.Module, *, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Split the trained parameters into groups for an optimiser.

    Args:
        network: The bare network, neither compiled nor wrapped for data parallelism.
        weight_decay: Of the parameters that have one.
        layer_decay: Factor of the learning rate from each layer to the one below; the groups then carry ``lr_scale``.

    Raises:
        ValueError: Nothing is to be trained, or the network cannot name its layers.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"{type(network).__name__} has no parameter that requires a gradient: nothing to train")
    exempt = no_decay_names(network)
    if layer_decay is None:
        return param_groups_weight_decay(network, weight_decay, no_weight_decay_list=exempt)
    if not hasattr(network, "group_matcher"):
        raise ValueError(
            f"optim.layer_decay={layer_decay} needs a network that groups its layers, and {type(network).__name__} has "
            "no group_matcher(); leave optim.layer_decay at null"
        )
    return param_groups_layer_decay(network, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
