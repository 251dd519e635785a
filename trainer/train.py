"""The training loop: epochs of steps, a test where one is due, a checkpoint after each."""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from data import worker_failures
from model.messages import listed
from util.distributed import is_lost_process, lost_in_nccl
from util.errors import EXIT_USER_ERROR, RunError, close_all
from util.logging import progress_bar
from util.memory import frozen_objects

from .batchnorm import equalise_statistics
from .evaluate import MAX_LISTED, AnswerSheet, Score
from .setup import Run
from .step import StepResult
from .stop import SignalError, StopError

__all__ = ["is_save_due", "train"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _EpochPace:
    """Images and time of this process's steps in an epoch, since it was started or resumed."""

    start: float = field(default_factory=time.perf_counter)
    num_images: int = 0
    step_seconds: float = 0.0
    data_seconds: float = 0.0

    def add(self, result: StepResult) -> None:
        self.num_images += result.num_images
        self.step_seconds += result.seconds["batch_t"]
        self.data_seconds += result.seconds["data_t"]


@dataclass(frozen=True, slots=True)
class _LaunchedStep:
    """A step that may still be running on a GPU."""

    iteration: int
    learning_rate: float
    result: StepResult


def train(run: Run) -> int:
    """Train to the end, or until a signal.

    Returns:
        The exit code of the process.

    Raises:
        RunError: If the run cannot continue; the message names the checkpoint to resume from.
    """
    if run.process.alarm is not None:
        run.process.alarm.explain = lambda: _lost(
            lost_in_nccl(run.process.rank, run.folder), last_good=run.saver.last_good
        )
    # Signals are only noted, even while the state is saved: a scheduler may send several. A second Ctrl-C raises.
    with run.watch, frozen_objects():
        try:
            code = _train_until_stopped(run)
        except StopError:
            raise
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"{stop}; {_resumable(run.saver.settle())}") from stop
        except (RuntimeError, OSError, ValueError) as error:
            explained = _explain(error, last_good=run.saver.settle())
            if explained is None:
                raise
            raise explained from error
        finally:
            close_all(run.profiler.close, run.report.close, run.saver.close)
    if code == 0:
        run.report.results(run.state)
    return code


def _train_until_stopped(run: Run) -> int:
    try:
        _train_epochs(run)
    except SignalError as stop:
        _save_and_wait(run)
        logger.info("%s; the state is saved, resume with trainer.resume_dir=%s", stop, run.folder)
        return stop.exit_code
    except StopError as stop:
        _save_and_wait(run)
        raise StopError(f"{stop}. The state is saved in {run.saver.last_good}", exit_code=stop.exit_code) from stop
    run.saver.wait()
    if not run.saver.is_in_place():
        _save_and_wait(run)
    return 0


def _train_epochs(run: Run) -> None:
    while run.state.epoch < run.schedule.num_epochs:
        with worker_failures(run.loaders.train.num_workers, rank=run.process.rank):
            pace = _EpochPace()
            _train_epoch(run, pace)
            _end_epoch(run, pace)


def _train_epoch(run: Run, pace: _EpochPace) -> None:
    """Do the steps of the epoch that are not done yet.

    A step is settled while the next one runs, or at once where a log line, a save or the end of the epoch is due. So a
    signal stops the run one step later at most, and only settled steps are saved.
    """
    state, num_steps = run.state, run.schedule.steps_per_epoch
    launched: list[_LaunchedStep] = []
    run.network.train()
    run.frozen.hold()
    batches = run.loaders.train.iterate(state.epoch, start_batch=state.step * run.config.trainer.accumulation_steps)
    with progress_bar(
        range(state.step, num_steps),
        title=f"Epoch {state.epoch + 1}/{run.schedule.num_epochs}",
        total=num_steps,
        start=state.step,
        is_shown=run.process.is_logging,
    ) as bar:
        for _ in bar:
            run.profiler.before(run.num_steps + 1)
            run.schedule.step(state.iteration)
            result = run.stepper(batches)
            state.step += 1
            state.iteration += 1
            run.num_steps += 1
            launched.append(_LaunchedStep(state.iteration, _learning_rate(run), result))
            stop = _settle(run, launched, pace)
            run.profiler.after(run.num_steps)
            columns = _log_line(run)
            if columns:
                bar.set_postfix_str(columns, refresh=False)
            if stop is not None:
                raise stop
            if _is_save_due(run):
                _save(run)


def _settle(run: Run, launched: list[_LaunchedStep], pace: _EpochPace) -> StopError | None:
    """Settle all steps but the last one, and that one too where it cannot wait; return a reason to stop."""
    cannot_wait = launched[-1].result.pending is None or _is_line_due(run) or _is_save_due(run)
    stop: StopError | None = None
    while len(launched) > (0 if cannot_wait or stop else 1):
        step = launched.pop(0)
        run.stepper.settle(step.result)
        pace.add(step.result)
        _log_step(run, step)
        reason = _count_step(run, step)
        stop = stop or reason
    return stop


def _is_line_due(run: Run) -> bool:
    state, options = run.state, run.config.logging
    is_last = state.step == run.schedule.steps_per_epoch
    return is_last or not state.iteration % options.train_log_per or not state.iteration % options.train_reset_log_per


def _is_save_due(run: Run) -> bool:
    return is_save_due(run.state.iteration, run.num_steps, every=run.config.trainer.save_per_iter)


def _log_step(run: Run, step: _LaunchedStep) -> None:
    """Put a step into the meters."""
    result = step.result
    run.meters.update({**result.seconds, "lr": step.learning_rate})
    if not result.is_skipped:
        run.meters.update(result.terms)
        run.epoch_meters.update(result.terms, count=result.num_images)


def _log_line(run: Run) -> str:
    """Write a log line if one is due; return its columns, or an empty text."""
    state, options = run.state, run.config.logging
    columns = ""
    if state.iteration % options.train_log_per == 0 or state.step == run.schedule.steps_per_epoch:
        columns = run.report.train_line(run.meters, state)
    if state.iteration % options.train_reset_log_per == 0:
        run.meters.reset()
    return columns


def _learning_rate(run: Run) -> float:
    return max(group["lr"] for group in run.optimizer.param_groups)


def _count_step(run: Run, step: _LaunchedStep) -> StopError | None:
    """Count failures; return the reason to stop, if there is one."""
    state, result = run.state, step.result
    state.skipped_steps += result.is_skipped
    state.bad_steps = state.bad_steps + 1 if result.is_bad else 0
    if result.is_skipped:
        logger.info("iteration %d is skipped on every process: %s", step.iteration, result.cause)
    stop = _count_unreadable(run, result.unreadable)
    if stop is not None:
        return stop
    if state.bad_steps >= run.config.trainer.max_bad_steps:
        return StopError(f"{state.bad_steps} steps in a row gave a loss or gradient that is not finite: {result.cause}")
    return None if result.signal is None else SignalError(result.signal)


def is_save_due(iteration: int, num_steps: int, *, every: int) -> bool:
    """Return whether to save within an epoch.

    Saves are due after 1, 2, 4, 8, ... steps of this process, so that a job which is killed again and again keeps at
    least half of the steps that it does each time.

    Args:
        iteration: Optimiser steps done altogether.
        num_steps: Those since the run was started or resumed.
        every: Save when the iteration is a multiple; 0 for no such saves.
    """
    return num_steps & (num_steps - 1) == 0 or (every > 0 and iteration % every == 0)


def _count_unreadable(run: Run, paths: list[str]) -> StopError | None:
    """Count the images that cannot be read; return the reason to stop where they are too many."""
    known, limit = run.state.unreadable, run.config.data.max_unreadable
    new = [path for path in paths if path not in known]
    known.extend(new)
    # The loader has named those of this process.
    others = [path for path in new if path not in run.loaders.train.unreadable]
    if others and run.process.is_logging:
        names = listed(others, MAX_LISTED)
        logger.warning("%d training images cannot be read so far, on other processes %s", len(known), names)
    if len(known) <= limit:
        return None
    message = f"{len(known)} training images cannot be read, more than data.max_unreadable={limit}: "
    return StopError(message + listed(known, MAX_LISTED), exit_code=EXIT_USER_ERROR)


def _end_epoch(run: Run, pace: _EpochPace) -> None:
    """Test if that is due, and save; only then does the epoch count as done."""
    state, options = run.state, run.config.trainer
    epoch = state.epoch + 1
    is_last = epoch == run.schedule.num_epochs
    is_test_due = epoch >= options.test_start_epoch or epoch % options.test_per_epoch == 0 or is_last
    scores, sheets = _test(run) if is_test_due else ({}, {})
    for name in state.add_scores(epoch, scores) if is_test_due else ():
        score = scores[name]
        run.saver.save_best(name, epoch=epoch, scores={"top1": score.top1, "top5": score.top5})
        run.report.mistakes(name, sheets[name].gather(run.process), run.loaders.test.dataset, epoch=epoch)
    run.schedule.epoch_end(state.epoch, scores["net"].top1 if scores else None)
    _report_epoch(run, pace, epoch, scores)
    state.epoch = epoch
    state.step = 0
    _save(run, periodic_epoch=epoch if epoch % options.save_per_epoch == 0 else None)


def _test(run: Run) -> tuple[dict[str, Score], dict[str, AnswerSheet]]:
    """Return the scores and the answers of the plain and the averaged weights."""
    networks = {"net": run.network}
    if run.average is not None:
        networks["net_E"] = run.average.module
    scores, sheets = {}, {}
    for name, network in networks.items():
        equalise_statistics(network, run.config.trainer.dist_BN, run.process)
        sheets[name] = AnswerSheet()
        scores[name] = run.evaluator(network, title=name, sheet=sheets[name])
        logger.info("Test %s: %s", name, scores[name])
    return scores, sheets


def _report_epoch(run: Run, pace: _EpochPace, epoch: int, scores: Mapping[str, Score]) -> None:
    now = time.perf_counter()
    # The others wait for the slowest within a step: only the wait for images tells them apart.
    waits, hosts = zip(*run.process.gather_objects((pace.data_seconds, socket.gethostname())), strict=True)
    slowest = waits.index(max(waits))
    if run.process.is_distributed:
        logger.info(
            "Epoch %d: rank %d on %s waited longest for images, %.1f s; the median is %.1f s",
            epoch,
            slowest,
            hosts[slowest],
            waits[slowest],
            statistics.median(waits),
        )
    record = {
        "epoch": epoch,
        "iteration": run.state.iteration,
        "lr": _learning_rate(run),
        "train": {name: reading.avg for name, reading in run.epoch_meters.read(run.process).items()},
        "images_per_second": run.process.sum([pace.num_images])[0] / max(pace.step_seconds, 1e-9),
        "slowest_rank": slowest,
        "slowest_rank_host": hosts[slowest],
        "slowest_rank_data_seconds": waits[slowest],
        "skipped_steps": run.state.skipped_steps,
        "unreadable": len(run.state.unreadable),
        "seconds": now - pace.start,
        "total_seconds": now - run.start,
    }
    run.report.epoch(record, scores)
    run.epoch_meters.reset()


def _save(run: Run, *, periodic_epoch: int | None = None) -> None:
    run.state.seconds = time.perf_counter() - run.start
    run.saver.save_latest(run.state, periodic_epoch=periodic_epoch)


def _save_and_wait(run: Run) -> None:
    _save(run)
    run.saver.wait()


def _resumable(last_good: str | None) -> str:
    return f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint yet"


def _explain(error: Exception, *, last_good: str | None) -> RunError | None:
    """Return the error to raise in place of one that only this process has met; None if it is a defect."""
    resumable = _resumable(last_good)
    text = str(error).strip()
    if is_lost_process(error):
        return RunError(_lost(text, last_good=last_good))
    if isinstance(error, RunError):
        return RunError(f"{text}; {resumable}", exit_code=error.exit_code)
    if isinstance(error, (OSError, ValueError)):
        return RunError(f"{text}; {resumable}", exit_code=EXIT_USER_ERROR)
    logger.error("the run ends with an error; %s", resumable)
    return None


def _lost(text: str, *, last_good: str | None) -> str:
    return f"another process of the run was lost; {_resumable(last_good)} ({text})"
