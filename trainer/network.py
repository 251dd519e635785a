"""The network of a run: built by name, with the weights that the mode starts from or tests."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs import Config
from model import MobileMamba, create_model
from model.checkpoint import head_names, read_checkpoint, select_state_dict
from model.lib_mamba.backends import choose as choose_backend
from util.distributed import Process

from .batchnorm import convert_sync_batch_norm

__all__ = ["build_network", "build_tested_network", "count_head_classes", "tested_weights", "wrap_parallel"]

logger = logging.getLogger(__name__)


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


def tested_weights(config: Config) -> dict[str, bool]:
    """Return which weights are tested: by the name they are reported under, whether they are averaged ones.

    A file with both ``net`` and ``net_E`` has both tested, with ``-m test_net`` only the first, with
    ``model.model_kwargs.ema`` only the second.

    Raises:
        ValueError: If there are no weights to test.
    """
    kwargs = config.model.model_kwargs
    if not _checkpoint_path(config):
        return {"net": False}
    if config.mode == "test_net":
        return {"net": False}
    if kwargs.ema:
        return {"net_E": True}
    checkpoint = read_checkpoint(kwargs.checkpoint_path)
    has_average = checkpoint.get("net_E") is not None
    has_plain = checkpoint.get("net") is not None or not has_average
    return {name: name == "net_E" for name, has in (("net", has_plain), ("net_E", has_average)) if has}


def count_head_classes(config: Config) -> int:
    """Return the number of classes that the weights of a run in mode predict tell apart.

    Raises:
        ValueError: If there are no weights, or they are without the head of such a network.
    """
    kwargs = config.model.model_kwargs
    path = _checkpoint_path(config)
    network = create_model(config.model.name, **_arguments(config))
    if not path:
        return network.num_classes
    weights, source = select_state_dict(read_checkpoint(path, mmap=True), ema=kwargs.ema, origin=path)
    widths = {len(weights[entry]) for head in head_names(network) if (entry := f"{head}.weight") in weights}
    if len(widths) != 1:
        raise ValueError(
            f"{path} ({source}) does not say how many classes {config.model.name} has, as it lacks "
            f"{head_names(network)[0]}.weight: name the network with model.name, or set nb_classes"
        )
    return widths.pop()


def _checkpoint_path(config: Config) -> str:
    """Return the path of the weights to test or predict with, empty for the network's own pretrained ones."""
    kwargs = config.model.model_kwargs
    if not (kwargs.checkpoint_path or kwargs.pretrained):
        raise ValueError(
            f"-m {config.mode} needs weights: give model.model_kwargs.checkpoint_path=PATH or "
            "model.model_kwargs.pretrained=true"
        )
    return kwargs.checkpoint_path


def build_tested_network(config: Config, process: Process, *, ema: bool) -> nn.Module:
    """Return the network with the plain or the averaged weights of the checkpoint, on its device, for a test.

    Raises:
        ValueError: If the weights do not fit.
    """
    kwargs = config.model.model_kwargs
    network = create_model(
        config.model.name,
        pretrained=_pretrained(config),
        checkpoint_path=kwargs.checkpoint_path,
        ema=ema,
        strict=kwargs.strict,
        fuse=kwargs.fuse,
        **_arguments(config),
    )
    return _place(network, config, process).eval()


def wrap_parallel(config: Config, network: nn.Module, process: Process) -> DistributedDataParallel | None:
    """Return the network wrapped to exchange gradients, None for one process.

    Buffers follow rank 0 at every step unless ``trainer.dist_BN`` names what happens to them before a test instead.
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


def _place(network: nn.Module, config: Config, process: Process) -> nn.Module:
    """Move the network to its device, and have the log say now what will run its scans there."""
    if isinstance(network, MobileMamba):
        choose_backend(process.device.type)
    memory_format = torch.channels_last if config.trainer.channels_last else torch.contiguous_format
    return network.to(process.device, memory_format=memory_format)


def _pretrained(config: Config) -> bool | str:
    """Return what ``create_model`` is to load: by name where the configuration gives one, else yes or no."""
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
