"""A classifier's published figures checked with the project's own test: its configuration, its loaders, its counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs import load_config
from model.zoo import Entry
from trainer import Tester
from util.distributed import Process

from .results import Result, judge
from .validation_set import doubts_about

__all__ = ["check_classifier"]


def check_classifier(
    entry: Entry, checkpoint: Path, process: Process, *, overrides: Sequence[str], tolerance: float | None
) -> tuple[list[Result], int]:
    """Test a checkpoint on the validation set; a collective.

    Args:
        entry: The checkpoint.
        checkpoint: Its file.
        process: This process.
        overrides: Overrides of its config, of which ``data.root`` is one.
        tolerance: In points; that of the data set when None.

    Returns:
        A result for the plain weights, and one for the averaged ones where the file holds both, which is not judged:
        ``pretrained=True`` loads the plain ones. Then the test's exit code, which is not 0 if a signal
        stopped it.

    Raises:
        ValueError: If the data set or the checkpoint is not fit for the test.
    """
    given = [*entry.overrides, *overrides]
    weights = f"model.model_kwargs.checkpoint_path={checkpoint}"
    config = load_config(entry.config, [*given, weights], mode="test", world_size=process.world_size)
    tester = Tester(config, process)
    exit_code = tester.run()
    doubts = doubts_about(tester.loaders.test.dataset, entry.dataset)
    points = entry.dataset.tolerance if tolerance is None else tolerance
    results = []
    for name, score in tester.scores.items():
        besides = ["averaged weights, not the plain ones that pretrained=True loads"] if results else []
        measured = {"top1": score.top1, "top5": score.top5}
        results.append(
            Result(
                name=entry.name,
                weights=name,
                config=entry.config,
                overrides=[override for override in given if not override.startswith("data.root=")],
                checkpoint=str(checkpoint),
                dataset=entry.dataset.title,
                fingerprint=tester.loaders.test.dataset.fingerprint(),
                num_images=score.num_images,
                seconds=tester.seconds[name],
                tolerance=points,
                figures=judge(entry, measured, tolerance=points, is_comparable=not doubts and not besides),
                doubts=[*doubts, *besides],
            )
        )
    return results, exit_code
