"""Fills in every entry that follows from others, once the overrides are known, and makes the tree read-only.

Entries that name one quantity are tied: an override of any of them is written to all. Entries that follow are filled
in where they are None, and listed in ``Config.derived`` so that they follow again when a saved configuration is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

from .overrides import get_entry, set_entry
from .schema import (
    CenterCrop,
    Config,
    CrossEntropyTerm,
    DistillationTerm,
    Finetune,
    LabelSmoothingTerm,
    Normalize,
    Resize,
    SoftTargetTerm,
    TimmTrainTransform,
)
from .tree import freeze, to_dict
from .values import convert, entry_types

__all__ = ["resolve", "with_classes"]

_TEST_MODES = ("test", "test_net", "predict")
_MODE_GROUPS = {"finetune": "ft", "predict": "predict"}  # groups that only one mode reads

_CLASSES = ("nb_classes", "data.nb_classes", "model.model_kwargs.num_classes", "trainer.mixup_kwargs.num_classes")

_NUM_WORKERS = 8  # of the recipe

# Files and folders; the teachers' checkpoints are among the terms of the loss.
_PATHS = (
    "data.root",
    "data.cache",
    "trainer.checkpoint",
    "trainer.resume_dir",
    "model.model_kwargs.checkpoint_path",
    "predict.input",
    "predict.output",
    "predict.sheet",
)

# The first entry of each group gives the value where none of the group is overridden.
_TIES = (
    ("epoch_full", "trainer.epoch_full"),
    ("warmup_epochs", "trainer.scheduler_kwargs.warmup_epochs"),
    ("test_start_epoch", "trainer.test_start_epoch"),
    ("batch_size", "trainer.data.batch_size"),
    ("weight_decay", "optim.optim_kwargs.weight_decay"),
    ("model.model_kwargs.in_chans", "data.channels"),
    _CLASSES,
)


def resolve(config: Config, given: Set[str], *, world_size: int) -> Config:
    """Fill in what follows, check what must agree, and return ``config`` read-only.

    Args:
        config: The tree, with the overrides in it and its mode set.
        given: Paths of the overridden entries.
        world_size: Number of processes.

    Raises:
        ValueError: where entries contradict each other.
    """
    for path in given:
        owner, _, name = path.partition(".")
        mode = _MODE_GROUPS.get(owner, config.mode)
        if mode != config.mode:
            way_out = f"; override {name} instead" if owner == "finetune" else ""
            raise ValueError(f"{path} holds only with -m {mode}{way_out}")
    _expand_homes(config)
    run = _Run(config, given)
    if config.mode == "predict" and run.given.isdisjoint(_CLASSES):
        for path in _CLASSES:
            set_entry(config, path, None)  # a recipe's number is not that of every checkpoint
    for group in _TIES:
        _tie(run, group)
    _share_batches(run, world_size)
    _share_test_batches(run, world_size)
    _follow_learning_rate(run)
    _follow_size(run)
    _follow_mixup(run)
    _follow_classes(run)
    _check_channels(config)
    _check_profile(config.trainer.profile)
    run.follow("trainer.scheduler_kwargs.noise_seed", config.seed)
    run.follow("trainer.data.num_workers_per_gpu", _NUM_WORKERS)
    if config.model.model_kwargs.fuse and config.mode not in _TEST_MODES:
        raise ValueError(f"model.model_kwargs.fuse=True folds the network for inference; not with -m {config.mode}")
    config.derived = run.derived
    return freeze(config)


def with_classes(config: Config, num_classes: int) -> Config:
    """Return a resolved configuration that left ``nb_classes`` open, with the number in it, read-only again.

    The number counts as derived: a run that starts from the saved configuration counts again.
    """
    filled: Config = convert(to_dict(config), Config, "")
    run = _Run(filled, set(), [*config.derived])
    for path in _CLASSES:
        set_entry(filled, path, num_classes)
    _follow_classes(run)
    filled.derived = list(dict.fromkeys([*run.derived, *_CLASSES]))
    return freeze(filled)


@dataclass
class _Run:
    config: Config
    given: Set[str]
    derived: list[str] = field(default_factory=list)

    def follow(self, path: str, value: Any) -> None:
        """Set the entry where it is None."""
        if get_entry(self.config, path) is None:
            set_entry(self.config, path, value)
            self.derived.append(path)


def _expand_homes(config: Config) -> None:
    """Replace a leading ``~`` in every path by the home folder."""
    terms = enumerate(config.loss.loss_terms)
    teachers = [index for index, term in terms if isinstance(term, DistillationTerm)]
    for path in (*_PATHS, *(f"loss.loss_terms.{index}.cfg.model_kwargs.checkpoint_path" for index in teachers)):
        set_entry(config, path, os.path.expanduser(get_entry(config, path)))  # noqa: PTH111 (Path("") is ".")


def _tie(run: _Run, group: tuple[str, ...]) -> None:
    """Give the entries of a group one value: the overridden one, else that of the first entry."""
    top, *others = group
    leader = f"finetune.{top}" if run.config.mode == "ft" and top in entry_types(Finetune) else top
    paths = dict.fromkeys((leader, *group))
    overridden = [path for path in paths if path in run.given and get_entry(run.config, path) is not None]
    source = overridden[0] if overridden else leader
    value = get_entry(run.config, source)
    for path in overridden or others:
        other = get_entry(run.config, path)
        if other not in (None, value):
            raise ValueError(f"{source}={value} and {path}={other} name one quantity; set only {source}")
    for path in others:
        run.follow(path, value)
    for path in paths:
        set_entry(run.config, path, value)


def _share_batches(run: _Run, world_size: int) -> None:
    """Tie total and per-process batches: total = per process * processes * accumulation steps."""
    data = run.config.trainer.data
    shares = world_size * run.config.trainer.accumulation_steps
    is_test = run.config.mode in _TEST_MODES
    pair = 2 if run.config.trainer.mixup_kwargs.is_active and not is_test else 1
    if pair == 2 and not data.drop_last:
        raise ValueError(
            "trainer.data.drop_last=False may leave a last batch of odd size, but mixup mixes images in pairs: keep "
            "it True, or turn mixup off with trainer.mixup_kwargs.prob=0"
        )
    is_share_given = "trainer.data.batch_size_per_gpu" in run.given
    is_total_given = "batch_size" in run.given or "trainer.data.batch_size" in run.given
    if data.batch_size_per_gpu is not None and (is_share_given or not is_total_given):
        total = data.batch_size_per_gpu * shares
        if is_total_given and total != run.config.batch_size:
            raise ValueError(
                f"batch_size={run.config.batch_size} and trainer.data.batch_size_per_gpu={data.batch_size_per_gpu} "
                f"disagree: {shares} (processes x accumulation steps) make {total}; give one of them"
            )
        _require_multiple("trainer.data.batch_size_per_gpu", data.batch_size_per_gpu, pair, "mixup pairs images")
        run.config.batch_size = data.batch_size = total
    elif not is_test:
        reason = "processes x accumulation steps" + (", twice that as mixup pairs images" if pair == 2 else "")
        _require_multiple("batch_size", run.config.batch_size, pair * shares, reason)
        data.batch_size_per_gpu = run.config.batch_size // shares
        run.derived.append("trainer.data.batch_size_per_gpu")


def _share_test_batches(run: _Run, world_size: int) -> None:
    data = run.config.trainer.data
    if data.batch_size_test is None:
        return
    if "trainer.data.batch_size_per_gpu_test" not in run.given:
        _require_multiple("trainer.data.batch_size_test", data.batch_size_test, world_size, "processes")
        data.batch_size_per_gpu_test = data.batch_size_test // world_size
        return
    total = data.batch_size_per_gpu_test * world_size
    if "trainer.data.batch_size_test" in run.given and total != data.batch_size_test:
        raise ValueError(
            f"trainer.data.batch_size_test={data.batch_size_test} and trainer.data.batch_size_per_gpu_test="
            f"{data.batch_size_per_gpu_test} disagree: {world_size} processes make {total}; give one of them"
        )
    data.batch_size_test = total


def _require_multiple(path: str, value: int, step: int, reason: str) -> None:
    if value % step:
        lower = value - value % step
        nearest = " or ".join(str(working) for working in (lower, lower + step) if working)
        raise ValueError(f"{path}={value} must be a multiple of {step} ({reason}); the nearest: {nearest}")


def _follow_learning_rate(run: _Run) -> None:
    config = run.config
    if "lr" in run.given and config.optim.lr is not None:
        raise ValueError(f"lr={config.lr} changes nothing where optim.lr={config.optim.lr}; give only optim.lr")
    divisor = config.finetune.lr_divisor if config.mode == "ft" else 1.0
    run.follow("optim.lr", config.lr * config.batch_size / 512 / divisor)
    applied = get_entry(config, "optim.lr")
    run.follow("trainer.scheduler_kwargs.lr_min", applied / 100)
    run.follow("trainer.scheduler_kwargs.warmup_lr", applied / 1000)


def _follow_size(run: _Run) -> None:
    size = run.config.size
    for pipeline in ("train_transforms", "test_transforms"):
        for index, transform in enumerate(getattr(run.config.data, pipeline)):
            path = f"data.{pipeline}.{index}"
            if isinstance(transform, TimmTrainTransform):
                run.follow(f"{path}.input_size", size)
            elif isinstance(transform, Resize):
                run.follow(f"{path}.size", int(size / transform.crop_pct))
            elif isinstance(transform, CenterCrop):
                run.follow(f"{path}.size", size)


def _follow_mixup(run: _Run) -> None:
    """Have the loss take what mixup gives: probabilities where it is on, class indices where it is off."""
    mixup, loss = run.config.trainer.mixup_kwargs, run.config.loss
    if not mixup.is_active and "loss.loss_terms" not in run.given:
        kind = LabelSmoothingTerm if mixup.label_smoothing > 0 else CrossEntropyTerm
        loss.loss_terms = [
            kind(name=term.name, lam=term.lam, fp32=term.fp32) if isinstance(term, SoftTargetTerm) else term
            for term in loss.loss_terms
        ]
    for index, term in enumerate(loss.loss_terms):
        path = f"loss.loss_terms.{index}"
        if isinstance(term, LabelSmoothingTerm):
            run.follow(f"{path}.smoothing", mixup.label_smoothing)
        if mixup.is_active and isinstance(term, CrossEntropyTerm | LabelSmoothingTerm):
            raise ValueError(
                f"{path}.type={term.type} takes class indices, but mixup gives probabilities; take SoftTargetCE, "
                "or turn mixup off with trainer.mixup_kwargs.prob=0"
            )
        if not mixup.is_active and isinstance(term, SoftTargetTerm):
            raise ValueError(
                f"{path}.type={term.type} takes probabilities, but mixup is off; take LabelSmoothingCE or CE"
            )


def _follow_classes(run: _Run) -> None:
    for index, term in enumerate(run.config.loss.loss_terms):
        if isinstance(term, DistillationTerm):
            run.follow(f"loss.loss_terms.{index}.cfg.model_kwargs.num_classes", run.config.nb_classes)


def _check_channels(config: Config) -> None:
    """Compare the channels of the images with what is said per channel."""
    channels = config.data.channels
    if channels not in (1, 3, 4):
        raise ValueError(f"data.channels={channels}: an image has 1 (gray), 3 (RGB) or 4 (RGBA)")
    lists: dict[str, list[float]] = {}
    for pipeline in ("train_transforms", "test_transforms"):
        for index, transform in enumerate(getattr(config.data, pipeline)):
            path = f"data.{pipeline}.{index}"
            if isinstance(transform, TimmTrainTransform | Normalize):
                lists |= {f"{path}.mean": transform.mean, f"{path}.std": transform.std}
            if isinstance(transform, TimmTrainTransform) and channels == 4 and transform.auto_augment is not None:
                raise ValueError(f"{path}.auto_augment works on RGB images; set it to None with data.channels=4")
    for index, term in enumerate(config.loss.loss_terms):
        if isinstance(term, DistillationTerm):
            path = f"loss.loss_terms.{index}"
            lists |= {f"{path}.{name}": getattr(term, name) for name in ("mean_t", "std_t", "mean_s", "std_s")}
            if term.cfg.model_kwargs.in_chans != channels:
                entry = f"{path}.cfg.model_kwargs.in_chans"
                raise ValueError(f"{entry}={term.cfg.model_kwargs.in_chans}, but data.channels={channels}; set it, too")
    for path, values in lists.items():
        if len(values) != channels:
            raise ValueError(f"{path} has {len(values)} values, but data.channels={channels}; give one per channel")


def _check_profile(text: str) -> None:
    steps = re.fullmatch(r"(\d+):(\d+)", text)
    if text and (steps is None or not 1 <= int(steps[1]) <= int(steps[2])):
        raise ValueError(f"trainer.profile={text} is not FIRST:LAST with 1 <= FIRST <= LAST, such as 10:15")
