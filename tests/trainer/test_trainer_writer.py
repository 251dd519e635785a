"""Checkpoints that a thread writes hold the moment of their save, though training continues meanwhile."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from trainer_cases import assert_same, comparable

from trainer.checkpoint import CheckpointStore, snapshot
from trainer.train import train
from trainer.writer import Writer


@pytest.fixture
def saved(build, monkeypatch):
    """Train; return what was written, each in the moment that it was."""

    def do(*more: str, is_late: bool) -> list[dict]:
        run = build(*more)
        is_waited_for, written = threading.Event(), []
        save, wait = CheckpointStore.save_latest, run.saver.wait

        def save_late(store, state):
            """Begin when the next save waits for this one, with the steps between them done."""
            assert not is_late or is_waited_for.wait(60)
            is_waited_for.clear()
            written.append(copy.deepcopy(dict(state)))
            return save(store, state)

        def release_and_wait():
            if run.saver._is_pending:
                is_waited_for.set()
            wait()

        monkeypatch.setattr(CheckpointStore, "save_latest", save_late)
        run.saver.wait = release_and_wait
        assert train(run) == 0
        monkeypatch.undo()
        return written

    return do


def test_what_is_written_late_is_what_was_there_at_the_save(saved):
    early = saved("test_start_epoch=0", is_late=False)
    late = saved("test_start_epoch=0", "trainer.async_save=true", is_late=True)
    assert [state["iter"] for state in late] == [1, 2, 3, 4, 6]
    for left, right in zip(late, early, strict=True):
        assert_same(comparable(left), snapshot(comparable(right)))


def test_an_error_in_the_thread_comes_with_the_next_wait():
    writer = Writer(is_asynchronous=True)

    def fail(contents):
        raise OSError(28, "No space left on device")

    done: list[float] = []
    writer(fail, {})
    writer(lambda contents: done.append(contents["value"].item()), {"value": torch.ones(())})
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    assert done == [1.0]
    writer.close()
