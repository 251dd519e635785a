"""The networks that are compared: the variants, the same spelled out, and the peers in timm, all folded.

Weights are random, as speed does not depend on them, but batch norms get statistics of their own, so that a fold that
goes wrong changes the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models import reparameterize_model
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.modules.batchnorm import _BatchNorm

from model import create_model, list_models

from .literal import create_literal

__all__ = ["LITERAL", "NAMES", "PEERS", "Candidate", "build", "fold_peer", "literal_name", "settle"]

PEERS = (
    "efficientvit_m5",
    "shvit_s3",
    "shvit_s4",
    "mobilenetv4_conv_small",
    "mobilenetv4_conv_medium",
    "repvit_m1_0",
    "repvit_m1_5",
    "levit_256",
    "efficientvim_m2",
    "efficientvim_m4",
    "edgenext_base",
    "fastvit_sa12",
    "starnet_s4",
    "mambaout_femto",
    "cpubone_nano",
    "cpubone_t0",
    "cpubone_s0",
    "cpubone_b0_bfrobust",
    "cpubone_b1_bfrobust",
    "cpubone_b3",
    "lowformer_b0",
    "lowformer_b1",
    "iformer_t",
    "iformer_s",
    "iformer_m",
)
_SUFFIX = " (literal)"


def literal_name(variant: str) -> str:
    """Return the name of a variant's literal network."""
    return variant + _SUFFIX


LITERAL = tuple(literal_name(variant) for variant in list_models())
NAMES = (*list_models(), *LITERAL, *PEERS)


@dataclass(frozen=True)
class Candidate:
    """A network ready to be measured.

    Attributes:
        name: One of `NAMES`.
        kind: "ours", "literal" or "peer".
        network: In evaluation mode, batch norms folded.
        size: Side of the input that it was published for, in pixels.
        parameters: Their number before folding, without what is not trained.
    """

    name: str
    kind: str
    network: nn.Module
    size: int
    parameters: int


def build(name: str, *, device: str = "cpu") -> Candidate:
    """Build a network by name and fold it.

    Args:
        name: One of `NAMES`.
        device: Where it is folded, which may lay its weights out for it.

    Raises:
        ValueError: If the name is not one of `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"no network {name!r} here; known: {', '.join(NAMES)}")
    if name in PEERS:
        network = settle(timm.create_model(name)).to(device)
        size = network.default_cfg["input_size"][-1]
        return Candidate(name, "peer", fold_peer(network), size, _count(network))
    variant = name.removesuffix(_SUFFIX)
    is_literal = name != variant
    network = settle(create_literal(variant) if is_literal else create_model(variant)).to(device)
    parameters = _count(network)
    return Candidate(name, "literal" if is_literal else "ours", network.fuse(), network.img_size, parameters)


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


@torch.no_grad()
def settle(network: nn.Module) -> nn.Module:
    """Give every batch norm weights and statistics as after training, in place: none is 0 or the identity."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.weight.uniform_(0.5, 1.0)
            module.bias.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def fold_peer(network: nn.Module) -> nn.Module:
    """Return a copy with its batch norms folded: by timm's own means, and what these leave by torch.fx.

    A batch norm stays where no convolution stands right before it.
    """
    folded = reparameterize_model(network)
    if _num_batch_norms(folded):
        _split_activations(folded)
        folded = _fold_by_tracing(folded)
    return folded


def _fold_by_tracing(network: nn.Module) -> nn.Module:
    """Fold a network as a whole, or, where its forward cannot be traced, each of its parts."""
    try:
        return optimization.fuse(network)
    except torch.fx.proxy.TraceError:
        for name, child in network.named_children():
            if _num_batch_norms(child):
                setattr(network, name, _fold_by_tracing(child))
        return network


def _num_batch_norms(network: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in network.modules())


def _split_activations(network: nn.Module) -> None:
    """Replace timm's norm-with-activation by the two apart, which torch.fx knows how to fold."""
    for name, child in network.named_children():
        if isinstance(child, BatchNormAct2d):
            bn = nn.BatchNorm2d(child.num_features, eps=child.eps).eval()
            bn.load_state_dict(child.state_dict())
            setattr(network, name, nn.Sequential(bn, child.drop, child.act))
        else:
            _split_activations(child)
