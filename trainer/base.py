"""The training loop: epochs of steps, a test where one is due, a checkpoint after each."""

from __future__ import annotations

import logging
import time

from data import worker_failures
from util.distributed import is_lost_process
from util.errors import EXIT_USER_ERROR, RunError
from util.logging import progress_bar
from util.memory import frozen_objects

from .batchnorm import equalise_statistics
from .evaluate import Score
from .setup import TrainerSetup
from .step import StepResult
from .stop import SignalError, StopError

__all__ = ["BaseTrainer"]

logger = logging.getLogger(__name__)

MAX_LISTED = 10


class BaseTrainer(TrainerSetup):
    """Trains a network that `TrainerSetup` has built."""

    def run(self) -> int:
        """Train to the end, or until a signal.

        Returns:
            The exit code of the process.

        Raises:
            RunError: If the run cannot go on; the message names the checkpoint that it can go on from.
        """
        self._mark = time.perf_counter()
        # Signals stay marks while the state is saved: a scheduler may send several.
        with self.watch, frozen_objects():
            try:
                self._train()
            except SignalError as stop:
                self._save()
                logger.info("%s; the state is saved, go on with trainer.resume_dir=%s", stop, self.folder)
                return stop.exit_code
            except StopError as stop:
                self._save()
                message = f"{stop}. The state is saved in {self.saver.last_good}"
                raise RunError(message, exit_code=stop.exit_code) from stop
            except (RuntimeError, OSError, ValueError) as error:
                explained = self._explain(error)
                if explained is None:
                    raise
                raise explained from error
            finally:
                self.report.close()
                self.saver.close()
        self.report.results(self.state)
        return 0

    def _train(self) -> None:
        while self.state.epoch < self.schedule.num_epochs:
            with worker_failures(self.config.trainer.data.num_workers_per_gpu):
                self._train_epoch()
                self._end_epoch()

    def _train_epoch(self) -> None:
        """Do the steps of the epoch that are not done yet."""
        state = self.state
        self.network.train()
        self.frozen.hold()
        self._epoch_mark = time.perf_counter()
        self._num_images = 0
        self._step_seconds = 0.0
        batches = self.loaders.train.iterate(state.epoch, start_batch=state.step * self.num_micro)
        steps = range(state.step, self.steps_per_epoch)
        with progress_bar(
            steps,
            title=f"Epoch {state.epoch + 1}/{self.schedule.num_epochs}",
            total=self.steps_per_epoch,
            start=state.step,
            is_shown=self.process.is_logging,
        ) as bar:
            for _ in bar:
                self.schedule.step(state.iteration)
                result = self.stepper(batches)
                state.step += 1
                state.iteration += 1
                columns = self._log_step(result)
                if columns:
                    bar.set_postfix_str(columns, refresh=False)
                self._check_step(result)

    def _log_step(self, result: StepResult) -> str:
        """Put a step into the meters; return the columns of a line, where one was due."""
        state, logging_config = self.state, self.config.logging
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        self.meters.update({**result.seconds, "lr": rate})
        self._num_images += result.num_images
        self._step_seconds += result.seconds["batch_t"]
        if not result.is_skipped:
            self.meters.update(result.terms)
            self.epoch_meters.update(result.terms, count=result.num_images)
        columns = ""
        if state.iteration % logging_config.train_log_per == 0 or state.step == self.steps_per_epoch:
            columns = self.report.train_line(
                self.meters,
                self.process,
                state,
                num_epochs=self.schedule.num_epochs,
                steps_per_epoch=self.steps_per_epoch,
            )
        if state.iteration % logging_config.train_reset_log_per == 0:
            self.meters.reset()
        return columns

    def _check_step(self, result: StepResult) -> None:
        """Count what went wrong, act on signals, and save where that is due between two epochs."""
        state, trainer = self.state, self.config.trainer
        state.skipped_steps += result.is_skipped
        state.bad_steps = state.bad_steps + 1 if result.is_bad else 0
        if result.is_skipped:
            cause = "loss or gradient is not finite" if result.is_bad else "overflow, the loss scale backs off"
            logger.info("iteration %d is skipped on every process: %s", state.iteration, cause)
        self._count_unreadable(result.unreadable)
        if state.bad_steps >= trainer.max_bad_steps:
            raise StopError(f"{state.bad_steps} steps in a row gave a loss or gradient that is not finite")
        if result.signal is not None:
            raise SignalError(result.signal)
        if trainer.save_per_iter and state.iteration % trainer.save_per_iter == 0:
            self._save()

    def _count_unreadable(self, paths: list[str]) -> None:
        known, limit = self.state.unreadable, self.config.data.max_unreadable
        new = [path for path in paths if path not in known]
        known.extend(new)
        for path in new if self.process.is_logging else ():
            logger.warning("training image %s cannot be read and is left out (%d so far)", path, len(known))
        if len(known) > limit:
            listed = ", ".join(known[:MAX_LISTED]) + (", ..." if len(known) > MAX_LISTED else "")
            message = f"{len(known)} training images cannot be read, more than data.max_unreadable={limit}: {listed}"
            raise StopError(message, exit_code=EXIT_USER_ERROR)

    def _end_epoch(self) -> None:
        """Test and save, as is due; only then does the epoch count as done."""
        state, trainer = self.state, self.config.trainer
        epoch = state.epoch + 1
        is_last = epoch == self.schedule.num_epochs
        is_test_due = epoch >= trainer.test_start_epoch or epoch % trainer.test_per_epoch == 0 or is_last
        scores = self._test() if is_test_due else {}
        for name in state.add_scores(epoch, scores) if is_test_due else ():
            score = scores[name]
            self.saver.save_best(name, epoch=epoch, scores={"top1": score.top1, "top5": score.top5})
        self.schedule.epoch_end(state.epoch, scores["net"].top1 if scores else None)
        self._report_epoch(epoch, scores)
        state.epoch = epoch
        state.step = 0
        self._save(periodic_epoch=epoch if epoch % trainer.save_per_epoch == 0 else None)

    def _test(self) -> dict[str, Score]:
        """Return the scores of the plain and the averaged weights."""
        networks = {"net": self.network}
        if self.average is not None:
            networks["net_E"] = self.average.network
        scores = {}
        for name, network in networks.items():
            equalise_statistics(network, self.config.trainer.dist_BN, self.process)
            scores[name] = self.test_network(network, title=name)
            logger.info("Test %s: %s", name, scores[name])
        return scores

    def _report_epoch(self, epoch: int, scores: dict[str, Score]) -> None:
        state = self.state
        now = time.perf_counter()
        record = {
            "epoch": epoch,
            "iteration": state.iteration,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train": {name: reading.avg for name, reading in self.epoch_meters.read(self.process).items()},
            "images_per_second": self.process.sum([self._num_images])[0] / max(self._step_seconds, 1e-9),
            "skipped_steps": state.skipped_steps,
            "unreadable": len(state.unreadable),
            "seconds": now - self._epoch_mark,
            "total_seconds": state.seconds + now - self._mark,
        }
        self.report.epoch(record, scores)
        self.epoch_meters.reset()

    def _save(self, *, periodic_epoch: int | None = None) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self._mark
        self._mark = now
        self.saver.save_latest(self.state, periodic_epoch=periodic_epoch)

    def _explain(self, error: Exception) -> RunError | None:
        """Return the error to raise for one that processes have not agreed on; None if it is a defect."""
        path = self.saver.last_good
        last_good = f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
        text = str(error).strip()
        if is_lost_process(error):
            return RunError(f"another process of the run was lost; {last_good} ({text})")
        if isinstance(error, RunError):
            return RunError(f"{text}; {last_good}", exit_code=error.exit_code)
        if isinstance(error, (OSError, ValueError)):
            return RunError(f"{text}; {last_good}", exit_code=EXIT_USER_ERROR)
        logger.error("the run ends with an error; %s", last_good)
        return None
