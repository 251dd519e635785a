"""A profile holds the steps that were asked for, and cannot stop a run."""

from __future__ import annotations

import errno
import json

import pytest
from torch.profiler import profile

from configs import load_config
from trainer.train import train


def test_the_steps_asked_for_are_profiled(build, finish):
    run, _ = finish("trainer.profile=2:3", "test_start_epoch=0")
    trace = json.loads((run.folder / "profile-2-3.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#") for name in names) == 2
    assert "aten::convolution" in (run.folder / "profile-2-3.txt").read_text()
    assert not list(build().folder.glob("profile*"))


def test_a_profile_that_fails_stops_nothing(build, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(profile, "export_chrome_trace", full)
    run = build("trainer.profile=5:50")  # the run ends before
    assert train(run) == 0
    assert "profile-5-50.json cannot be written (No space left on device): the run continues" in caplog.text


@pytest.mark.parametrize("steps", ["3", "0:2", "5:4", "a:b", "1:2:3"])
def test_other_steps_are_refused(steps):
    with pytest.raises(ValueError, match=rf"trainer\.profile={steps} is not FIRST:LAST .*such as 10:15"):
        load_config("configs/quickstart", [f"trainer.profile={steps}"])
