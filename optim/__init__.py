"""The optimiser of a run, its learning rate over time, and the clipping of gradients."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from torch import nn

from configs.schema import Config, OptimKwargs
from model.lib_mamba import SS2D

from .clip import clip_gradients
from .param_groups import no_decay_names, parameter_groups
from .schedule import Schedule, build_scheduler

__all__ = [
    "Schedule",
    "build_optimizer",
    "build_scheduler",
    "clip_gradients",
    "no_decay_names",
    "parameter_groups",
]

logger = logging.getLogger(__name__)

LOOKAHEAD = "lookahead_"  # timm's prefix that wraps any optimiser
# Adagrad has no such form there, and SGD's leaves its momentum uninitialised where the first step is skipped.
FUSED_ON_GPUS = ("adam", "adamw")
ENTRIES = ("betas", "eps", "amsgrad", "momentum", "nesterov")  # passed on to the optimisers that take them


def build_optimizer(config: Config, network: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser that ``optim.optim_kwargs`` names, any of timm's.

    Args:
        config: The resolved run.
        network: The bare network, neither compiled nor wrapped for data parallelism.

    Raises:
        ValueError: The name is unknown, an argument is not one of the optimiser's, a package for it is missing,
            nothing is to be trained, or second derivatives are asked of a network without.
    """
    kwargs = config.optim.optim_kwargs
    _check_name(kwargs.name, create_graph=config.loss.create_graph)
    if config.loss.create_graph and any(isinstance(module, SS2D) for module in network.modules()):
        raise ValueError(
            "loss.create_graph=true asks for second derivatives, which MobileMamba's scan does not have: set "
            "loss.create_graph=false, and an optimiser of first order (optim.optim_kwargs.name=adamw)"
        )
    arguments = _arguments(kwargs)
    if _can_fuse(kwargs.name, network) and not {"foreach", "fused"} & set(arguments):
        arguments["fused"] = True
    groups = parameter_groups(network, weight_decay=kwargs.weight_decay, layer_decay=config.optim.layer_decay)
    try:
        return create_optimizer_v2(
            groups, kwargs.name, lr=config.optim.lr, weight_decay=kwargs.weight_decay, **arguments
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimiser {kwargs.name}: {error}") from error


def _check_name(name: str, *, create_graph: bool) -> None:
    known = list_optimizers()
    bare_name = name.lower().removeprefix(LOOKAHEAD)
    if bare_name not in known:
        nearest = difflib.get_close_matches(bare_name, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"optim.optim_kwargs.name: there is no optimiser {name!r}; the nearest is {nearest!r}. "
            "timm.optim.list_optimizers() names all"
        )
    if get_optimizer_info(bare_name).second_order and not create_graph:
        raise ValueError(f"optimiser {name} needs second derivatives: set loss.create_graph=true")


def _arguments(kwargs: OptimKwargs) -> dict[str, Any]:
    """Return the entries of the configuration that go to the optimiser.

    An entry left at the recipe's default is AdamW's, and passed over where the optimiser has no such argument or one
    of another form; an entry that was set must be taken.
    """
    recipe = OptimKwargs()
    accepted = _accepted(kwargs.name)
    arguments = {}
    for name in ENTRIES:
        value = getattr(kwargs, name)
        if value is None:
            continue
        if name == "betas":
            value, recipe_value = tuple(value), tuple(recipe.betas)
        else:
            recipe_value = getattr(recipe, name)
        is_default = value == recipe_value
        if _fits(name, value, accepted, is_default=is_default):
            arguments[name] = value
        elif not is_default:
            raise ValueError(_not_taken(kwargs.name, f"optim.optim_kwargs.{name}={value}", accepted))
        elif name in accepted:
            logger.info("optimiser %s keeps its own %s, %s", kwargs.name, name, accepted[name])
    return arguments | _extra(kwargs, accepted)


def _can_fuse(name: str, network: nn.Module) -> bool:
    """Return whether PyTorch has the optimiser in one pass, not one for each of its operations.

    On a GPU it then also reads from the GPU whether to skip a step, where others would wait for the answer.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if "fused" not in _accepted(name) or not all(parameter.is_floating_point() for parameter in parameters):
        return False
    kinds = {parameter.device.type for parameter in parameters}
    return kinds == {"cpu"} or (kinds == {"cuda"} and name.lower().removeprefix(LOOKAHEAD) in FUSED_ON_GPUS)


def _accepted(name: str) -> dict[str, Any]:
    """Return the optimiser's arguments with their defaults."""
    bare_name = name.lower().removeprefix(LOOKAHEAD)
    try:
        optimizer_class = get_optimizer_class(bare_name, bind_defaults=False)
    except (AssertionError, ImportError) as error:  # timm asserts that there is a GPU
        raise ValueError(f"optimiser {name} is not available here: {error}") from error
    parameters = inspect.signature(optimizer_class).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    return defaults | (get_optimizer_info(bare_name).defaults or {})


def _fits(name: str, value: Any, accepted: Mapping[str, Any], *, is_default: bool) -> bool:
    if name not in accepted:
        return False
    if accepted[name] is None:  # an option that is off by itself stays so, unless it was set
        return not is_default
    return name != "betas" or len(value) == len(accepted[name])


def _extra(kwargs: OptimKwargs, accepted: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``extra``, checked: an argument that has its own entry, or that is not taken, is refused."""
    for name, value in kwargs.extra.items():
        if name in ENTRIES or name in ("lr", "weight_decay"):
            entry = "optim.lr" if name == "lr" else f"optim.optim_kwargs.{name}"
            raise ValueError(f"optim.optim_kwargs.extra.{name}: the entry for it is {entry}")
        if name not in accepted or name == "params":
            raise ValueError(_not_taken(kwargs.name, f"optim.optim_kwargs.extra.{name}={value}", accepted))
    return dict(kwargs.extra)


def _not_taken(name: str, entry: str, accepted: Mapping[str, Any]) -> str:
    own = ", ".join(f"{key}={value}" for key, value in accepted.items() if key not in ("params", "lr", "weight_decay"))
    return f"optimiser {name} does not take {entry}; its arguments and their defaults: {own}"
