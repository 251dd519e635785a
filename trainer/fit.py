"""Whether a checkpoint's contents fit the run that resumes from it: checked as a whole, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from configs.schema import Config, OptimKwargs
from model.messages import listed
from model.mismatch import compare, explain

__all__ = ["check_contents", "load_optimizer"]


def check_contents(
    checkpoint: Mapping[str, Any],
    config: Config,
    *,
    networks: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    path: str,
) -> None:
    """Check that everything in a checkpoint can be put back into a run.

    Args:
        checkpoint: Its entries, `TRAINING_ENTRIES` among them.
        config: The resolved run. The optimiser is left out where ``trainer.resume_optimizer`` is false.
        networks: The run's networks, by the entry that each is resumed from.
        optimizer: Its optimiser.
        progress: Counters of a new run, by name.
        path: The checkpoint, for messages.

    Raises:
        ValueError: One report of everything that does not fit, and the way out.
    """
    problems = [
        problem for name, network in networks.items() for problem in _network_problems(name, checkpoint[name], network)
    ]
    if config.trainer.resume_optimizer:
        problems += _optimizer_problems(checkpoint, config, optimizer)
    problems += [*_progress_problems(checkpoint.get("progress"), progress), *_rank_problems(checkpoint["rng"])]
    if not isinstance(checkpoint["scheduler"], Mapping):
        problems.append("scheduler: it holds no state.")
    if problems:
        raise ValueError(
            f"{path} does not fit this run. {' '.join(problems)} Resume with the configuration that the run was started"
            f" with, or start a new run from its weights with model.model_kwargs.checkpoint_path={path}"
        )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], config: Config) -> None:
    """Put back an optimiser's state; the settings stay those of the configuration.

    Args:
        optimizer: The run's optimiser.
        saved: The state dict of the checkpoint, checked by `check_contents`.
        config: The resolved run.
    """
    names = _settings(config)
    settings = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(saved))
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update({name: value for name, value in values.items() if _differ(group.get(name), value)})


def _network_problems(name: str, weights: Any, network: nn.Module) -> Iterator[str]:
    if not isinstance(weights, Mapping):
        yield f"{name}: it holds no weights."
        return
    own = network.state_dict()
    report = compare(weights, own, source=name)
    if not report.fits:
        yield f"{name}: {' '.join(explain(report, weights, own, heads=()))}"


def _optimizer_problems(
    checkpoint: Mapping[str, Any], config: Config, optimizer: torch.optim.Optimizer
) -> Iterator[str]:
    """Yield what keeps the optimiser from continuing with the checkpoint's state."""
    then, now = _entries(checkpoint, "config", "optim"), config.optim
    name = _entries(then, "optim_kwargs").get("name", now.optim_kwargs.name)
    groups = _entries(checkpoint, "optimizer").get("param_groups", ())
    sizes, own_sizes = ([len(group["params"]) for group in some] for some in (groups, optimizer.param_groups))
    if str(name).lower() != now.optim_kwargs.name.lower():
        cause = f"the file has that of {name}, this run takes {now.optim_kwargs.name}"
    elif sizes != own_sizes:
        cause = (
            f"the file has {len(sizes)} groups of {sum(sizes)} parameters, this run {len(own_sizes)} of "
            f"{sum(own_sizes)} (optim.layer_decay={then.get('layer_decay')} there and {now.layer_decay} here)"
        )
    else:
        cause = _fixed_settings(groups, optimizer.param_groups, _settings(config))
    if cause:
        yield f"optimizer: {cause}; start it afresh with trainer.resume_optimizer=false."


def _fixed_settings(groups: list[dict[str, Any]], own: list[dict[str, Any]], settings: Sequence[str]) -> str:
    """Return what differs in groups of the same sizes that cannot change between two steps; empty if nothing does."""
    lacking, changed = set(), set()
    for then, now in zip(groups, own, strict=True):
        lacking |= {name for name in settings if (name in then) != (name in now)}
        changed |= {
            f"{name}={then[name]} in the file and {now[name]} in this run"
            for name in settings
            if name in then and name in now and not _is_adjustable(name, then[name], now[name])
        }
    if lacking:
        return f"the file's is of another kind: only one of the two has {', '.join(sorted(lacking))}"
    return f"what it keeps depends on {listed(sorted(changed))}" if changed else ""


def _settings(config: Config) -> list[str]:
    """Return the entries of an optimiser's groups that a configuration sets, other than the scheduled learning rate."""
    own = [entry.name for entry in fields(OptimKwargs) if entry.name not in ("name", "extra")]
    return [*own, *config.optim.optim_kwargs.extra, "lr_scale"]


def _is_adjustable(name: str, then: Any, now: Any) -> bool:
    """Return whether a setting may change between two steps: numbers may, unless they switch something on or off."""
    if not _differ(then, now):
        return True
    are_numbers = all(isinstance(value, (int, float, list, tuple)) for value in (then, now))
    return are_numbers and (name == "weight_decay" or bool(then) == bool(now))


def _differ(then: Any, now: Any) -> bool:
    if isinstance(then, (list, tuple)) and isinstance(now, (list, tuple)):
        return list(then) != list(now)
    return bool(then != now)


def _progress_problems(saved: Any, expected: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(saved, Mapping):
        yield "progress: the file lacks it, or it holds no counters."
        return
    lacking = [name for name in expected if name not in saved]
    wrong = [name for name, value in expected.items() if name in saved and not _is_like(saved[name], value)]
    if lacking:
        yield f"progress: it lacks {', '.join(lacking)}."
    if wrong:
        yield f"progress: of another kind are {', '.join(f'{name}={saved[name]!r}' for name in wrong)}."


def _is_like(value: Any, example: Any) -> bool:
    return isinstance(value, (int, float) if isinstance(example, float) else type(example))


def _rank_problems(saved: Any) -> Iterator[str]:
    if not isinstance(saved, list) or not all(
        isinstance(own, Mapping) and {"state", "meters"} <= set(own) for own in saved
    ):
        yield "rng: it holds no random states and meters by process."


def _entries(tree: Any, *names: str) -> Mapping[str, Any]:
    """Return a group of entries within others; an empty one where it is missing, as in older checkpoints."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}
