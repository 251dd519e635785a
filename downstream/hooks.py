"""Checks before a run's first step, for every task. Without them, OpenMMLab runs with what does not fit.

A class count other than the data set's is an index error, or goes unnoticed. Entries of a checkpoint that do not fit
are left out with a line in the log, and the figures that follow are those of random weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from model.checkpoint import select_state_dict
from model.messages import listed
from model.mismatch import compare, explain

from .pretrained import backbone_entries, check_backbone

__all__ = ["CheckpointFitHook", "ClassCountHook"]


@HOOKS.register_module(force=True)
class ClassCountHook(Hook):
    """Compare the class count of every head with the data set's classes.

    Raises:
        ValueError: Before the first step, if they differ; both counts are named.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Runner) -> None:
        """Check the training data."""
        check_class_counts(_bare_model(runner), runner.train_dataloader.dataset)

    def before_val(self, runner: Runner) -> None:
        """Check the validation data."""
        check_class_counts(_bare_model(runner), runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Check the test data."""
        check_class_counts(_bare_model(runner), runner.test_dataloader.dataset)


def check_class_counts(model: nn.Module, dataset: Any) -> None:
    """Raise a ValueError where a head has another number of classes than the data set."""
    classes: Sequence[str] = dataset.metainfo.get("classes") or ()
    if not classes:
        return
    for name, count in _class_counts(model):
        if count != len(classes):
            raise ValueError(
                f"{name} has num_classes={count}, but {type(dataset).__name__} has {len(classes)} classes "
                f"({listed(classes)}): set model.{name}.num_classes={len(classes)}, or the data set's metainfo.classes "
                "to the model's"
            )


def _class_counts(model: nn.Module) -> Iterator[tuple[str, int]]:
    for name, module in model.named_modules():
        # A proposal network tells objects from background, whatever the classes.
        is_head = isinstance(getattr(module, "num_classes", None), int) and not name.endswith("rpn_head")
        if name and is_head:
            yield name, module.num_classes


@HOOKS.register_module(force=True)
class CheckpointFitHook(Hook):
    """Refuse a checkpoint of another model, whether it is tested, resumed or the start of a training.

    At the start of a training (`load_from`), heads and neck may differ: these are then initialised again.

    Raises:
        ValueError: If it does not fit; entries are counted by module, and the backbone's variant is guessed.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the entries before they are put into the model."""
        # Only training has built its optimizer by now.
        is_start = isinstance(runner.optim_wrapper, OptimWrapper) and not runner.cfg.get("resume")
        origin = runner.cfg.get("load_from") or "the checkpoint"
        check_fit(_bare_model(runner), checkpoint, origin=origin, backbone_only=is_start)


def check_fit(model: nn.Module, checkpoint: Mapping[str, Any], *, origin: str, backbone_only: bool = False) -> None:
    """Raise a ValueError where a checkpoint's entries are not exactly the model's.

    Args:
        model: A detector, segmentor or classifier whose backbone is `MobileMambaBackbone`.
        checkpoint: What was saved of one: ``state_dict`` in it is compared.
        origin: The file, for messages.
        backbone_only: Let everything but the backbone differ.
    """
    weights, source = select_state_dict(checkpoint, ema=False, origin=origin)
    own = model.state_dict()
    title = f"{origin} ({source}) does not fit {type(model).__name__}."
    check_backbone(backbone_entries(weights), backbone_entries(own), source=source, title=title)
    report = compare(weights, own, source=source)
    if report.fits or backbone_only:
        return
    hint = "Heads of another class count or type: set num_classes, or use the configuration it was trained with."
    raise ValueError("\n  ".join([title, *explain(report, weights, own, heads=()), hint]))


def _bare_model(runner: Runner) -> nn.Module:
    """Return the model inside what wraps it for several processes or for test-time augmentation."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
