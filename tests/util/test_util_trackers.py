"""Trackers get the numbers of a run, each by its own library and without a network, and hold up nothing."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from util import trackers
from util.logging import LogGuard
from util.trackers import Background, MlflowLog, ScalarLogs, WandbLog, require

CONFIG = {"seed": 42, "model": {"name": "MobileMamba_T2", "sizes": [1, 2]}}
VALUES = [(3, {"train/CE": 2.5, "train/lr": 1e-3}), (4, {"train/CE": 2.25})]


def write_in_two_runs(log, folder):
    """Write through a thread; the second of the values is that of a run that resumes."""
    for step, values in VALUES:
        tracker = Background(lambda: log(folder, "digits", CONFIG))
        tracker.write(values, step=step)
        tracker.close()
        time.sleep(1)  # the seconds are in the name of a folder of wandb's


def records(data: bytes) -> Iterator[bytes]:
    """Yield what a file of wandb holds: after 7 bytes, LevelDB's log of blocks of 32 KiB."""
    position, parts = 7, b""
    while position < len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    write_in_two_runs(WandbLog, tmp_path)
    found, runs = {}, set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                runs.add((record.run.project, record.run.run_id))
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if values:
                found[record.history.step.num] = {name: values[name] for name in values if name.startswith("train/")}
    assert runs == {("digits", tmp_path.name)}
    assert list(found.items()) == VALUES


def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'tracked'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write_in_two_runs(MlflowLog, tmp_path / "run_1")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    history = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/CE")]
    assert history == [(3, 2.5), (4, 2.25)]
    assert (run.info.run_name, run.info.status) == ("run_1", "FINISHED")
    assert run.data.params == {"seed": "42", "model.name": '"MobileMamba_T2"', "model.sizes": "[1, 2]"}


class Recorder:
    def __init__(self):
        self.values = []

    def write(self, values, *, step):
        self.values.append((step, values))

    def close(self):
        self.values.append("closed")


def test_one_that_hangs_or_fails_is_named_and_disturbs_no_other(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "PATIENCE_SECONDS", 0.2)
    never, healthy = threading.Event(), Recorder()

    def fail():
        raise RuntimeError("no such host")

    guard = LogGuard()
    openers = {
        "hanging": lambda: Background(lambda: never.wait() and Recorder()),
        "failing": lambda: Background(fail),
        "absent": lambda: None,
        "healthy": lambda: healthy,
    }
    logs = ScalarLogs(guard, openers)
    for step, values in VALUES:
        logs.write(values, step=step)
    logs.close()
    never.set()
    assert healthy.values == [*VALUES, "closed"]
    assert guard.failures == {"hanging": "it does not answer within 0 s", "failing": "no such host"}
    assert "failing cannot be written (no such host): the run continues without it" in caplog.text


def test_a_library_that_is_not_installed_is_told_of():
    require("logging.wandb", "json", "nothing")
    with pytest.raises(ValueError, match=r"logging\.wandb needs no_such_library: pip install some-package"):
        require("logging.wandb", "no_such_library", "some-package")
