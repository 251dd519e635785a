"""The network of a run: built by name, with the weights that the mode starts from or tests."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs import Config
from configs.schema import Trainer as TrainerConfig
from model import TIMM_PREFIX, MobileMamba, create_model
from model.checkpoint import HEADS, network_prefixes, read_checkpoint, select_state_dict
from model.lib_mamba.backends import choose as choose_backend
from model.lib_teacher import TEACHERS
from util.distributed import Process

from .batchnorm import convert_sync_batch_norm

__all__ = [
    "build_network",
    "build_tested_network",
    "count_head_classes",
    "memory_format",
    "read_weights",
    "tested_weights",
    "wrap_parallel",
]


def build_network(config: Config, process: Process) -> nn.Module:
    """Return the network to train, on its device; in mode ``ft`` with a checkpoint's weights and a head that fits.

    Raises:
        ValueError: If there is nothing to fine-tune, or weights do not fit.
    """
    kwargs = config.model.model_kwargs
    if config.mode == "ft" and not (kwargs.checkpoint_path or kwargs.pretrained):
        raise ValueError(
            "-m ft starts from a checkpoint: give model.model_kwargs.checkpoint_path=PATH or "
            "model.model_kwargs.pretrained=true, or train from scratch with -m train"
        )
    network = create_model(
        config.model.name,
        pretrained=_pretrained(config),
        checkpoint_path=kwargs.checkpoint_path,
        ema=kwargs.ema,
        strict=kwargs.strict,
        reset_head=config.mode == "ft",
        **_arguments(config),
    )
    return convert_sync_batch_norm(_place(network, config, process), config.trainer.sync_BN, process)


def read_weights(config: Config) -> dict[str, Any] | None:
    """Read the checkpoint of a test or a prediction, once for all that is asked of it.

    Its tensors are mapped from the file and read as a network takes them over.

    Returns:
        The checkpoint's entries; None for the network's own pretrained weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If no weights are given, or the file cannot be read.
    """
    kwargs = config.model.model_kwargs
    if not (kwargs.checkpoint_path or kwargs.pretrained):
        raise ValueError(
            f"-m {config.mode} needs weights: give model.model_kwargs.checkpoint_path=PATH or "
            "model.model_kwargs.pretrained=true"
        )
    return read_checkpoint(kwargs.checkpoint_path, mmap=True) if kwargs.checkpoint_path else None


def tested_weights(config: Config, checkpoint: Mapping[str, Any] | None) -> dict[str, bool]:
    """Return which weights are tested: by the name they are reported under, whether they are averaged ones.

    A file with both ``net`` and ``net_E`` has both tested, with ``-m test_net`` only the first, with
    ``model.model_kwargs.ema`` only the second.

    Args:
        config: The resolved run.
        checkpoint: The checkpoint's entries, from `read_weights`.
    """
    if checkpoint is None or config.mode == "test_net":
        return {"net": False}
    if config.model.model_kwargs.ema:
        return {"net_E": True}
    has_average = checkpoint.get("net_E") is not None
    has_plain = checkpoint.get("net") is not None or not has_average
    return {name: name == "net_E" for name, has in (("net", has_plain), ("net_E", has_average)) if has}


def count_head_classes(config: Config, checkpoint: Mapping[str, Any] | None) -> int:
    """Return the number of classes that the weights of a run in mode predict tell apart.

    Args:
        config: The resolved run.
        checkpoint: The checkpoint's entries, from `read_weights`.

    Raises:
        ValueError: If the weights lack the head of such a network.
    """
    name, kwargs = config.model.name, config.model.model_kwargs
    # timm knows MobileMamba by its name, too; an unknown name is left to `create_model`, which names the nearest.
    timm_name = TEACHERS.get(name.lower(), name.lower().removeprefix(TIMM_PREFIX))
    known = timm.get_pretrained_cfg(timm_name) or PretrainedCfg()
    if checkpoint is None:
        return known.num_classes
    heads = known.classifier or HEADS
    heads = (heads,) if isinstance(heads, str) else heads
    weights, source = select_state_dict(
        checkpoint, ema=kwargs.ema, origin=kwargs.checkpoint_path, prefixes=network_prefixes()
    )
    widths = {len(weights[entry]) for head in heads if (entry := f"{head}.weight") in weights}
    if len(widths) != 1:
        raise ValueError(
            f"{kwargs.checkpoint_path} ({source}) does not say how many classes {name} has, as it lacks "
            f"{heads[0]}.weight: name the network with model.name, or set nb_classes"
        )
    return widths.pop()


def build_tested_network(
    config: Config, process: Process, checkpoint: Mapping[str, Any] | None, *, ema: bool
) -> nn.Module:
    """Return the network with the plain or the averaged weights of the checkpoint, on its device, for a test.

    Args:
        config: The resolved run.
        process: This process.
        checkpoint: The checkpoint's entries, from `read_weights`.
        ema: Whether the averaged weights are wanted.

    Raises:
        ValueError: If the weights do not fit.
    """
    kwargs = config.model.model_kwargs
    network = create_model(
        config.model.name,
        pretrained=_pretrained(config),
        checkpoint_path=kwargs.checkpoint_path,
        checkpoint=checkpoint,
        ema=ema,
        strict=kwargs.strict,
        fuse=kwargs.fuse,
        **_arguments(config),
    )
    return _place(network, config, process).eval()


def wrap_parallel(config: Config, network: nn.Module, process: Process) -> DistributedDataParallel | None:
    """Return the network wrapped to exchange gradients, None for one process.

    Buffers follow rank 0 at every step, unless ``trainer.dist_BN`` has them made equal before a test instead.
    """
    if not process.is_distributed:
        return None
    # The strides of a depthwise kernel's one-element dimension may differ; they mean nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        network,
        device_ids=[process.device.index] if process.device.type == "cuda" else None,
        find_unused_parameters=config.trainer.find_unused_parameters,
        broadcast_buffers=config.trainer.dist_BN == "",
        gradient_as_bucket_view=True,
    )


def memory_format(options: TrainerConfig, device: torch.device) -> torch.memory_format:
    """Return how the network's weights and its images (B, C, H, W) lie in memory on a device."""
    is_last = device.type == "cuda" if options.channels_last is None else options.channels_last
    return torch.channels_last if is_last else torch.contiguous_format


def _place(network: nn.Module, config: Config, process: Process) -> nn.Module:
    """Move the network to its device, and log which backend will run its scans there."""
    if isinstance(network, MobileMamba):
        choose_backend(process.device.type)
    return network.to(process.device, memory_format=memory_format(config.trainer, process.device))


def _pretrained(config: Config) -> bool | str:
    """Return ``pretrained`` of `create_model`: a checkpoint's name where the configuration gives one, or a bool."""
    pretrained = config.model.model_kwargs.pretrained
    return config.model.released or True if pretrained is True else pretrained


def _arguments(config: Config) -> dict[str, Any]:
    kwargs = config.model.model_kwargs
    arguments: dict[str, Any] = {"in_chans": kwargs.in_chans, **kwargs.extra}
    if kwargs.num_classes is not None:
        arguments["num_classes"] = kwargs.num_classes
    if kwargs.drop_path is not None:
        arguments["drop_path"] = kwargs.drop_path
    if kwargs.distillation:
        arguments["distillation"] = True
    if kwargs.scan_backend:
        arguments["scan_backend"] = kwargs.scan_backend
    return arguments
