"""Checkpoint files: what one must hold, and what mmengine keeps next to the weights."""

from __future__ import annotations

import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from zoo_cases import released_weights, saved

from model.zoo import find, verify
from model.zoo.verification import DOWNSTREAM_ENTRIES, record_path


@pytest.mark.parametrize("name", ["mobilemamba_t2s", "mobilemamba_b4", "maskrcnn", "ssdlite_512", "pspnet"])
def test_a_file_with_the_released_entries_is_verified_and_recorded(name, tmp_path, parity_json):
    entry = find(name)
    weights = released_weights(entry, parity_json("downstream_state_dict.json"))
    file = saved(tmp_path / "file.pth", {"state_dict" if entry.task != "imagenet" else "net": weights})
    checksum = verify(entry, file)
    record = json.loads(record_path(file).read_text())
    assert record["name"] == name
    assert (record["size"], record["sha256"]) == (file.stat().st_size, checksum.sha256)
    assert verify(entry, file) == checksum


def test_entries_outside_the_backbone_are_the_released_ones(parity_json):
    lists = json.loads(DOWNSTREAM_ENTRIES.read_text())
    for name, facts in parity_json("downstream_state_dict.json").items():
        assert lists[find(name).entries] == facts["not_backbone"]


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("mobilemamba_t4", lambda weights: None, r"looks like MobileMamba_T2"),
        ("mobilemamba_t2", lambda weights: weights.pop("head.l.bias"), r"1 missing from the file: head 1"),
        ("mobilemamba_t2", lambda weights: weights.update(extra=torch.zeros(1)), r"1 unexpected in the file: extra 1"),
    ],
)
def test_a_file_with_other_entries_is_refused(name, spoil, message, tmp_path):
    weights = released_weights(find("mobilemamba_t2"))
    spoil(weights)
    file = saved(tmp_path / "file.pth", {"net": weights})
    with pytest.raises(ValueError, match=message):
        verify(find(name), file)
    assert not record_path(file).exists()


def test_averaged_weights_next_to_the_plain_ones_are_verified_too(tmp_path):
    weights = released_weights(find("mobilemamba_t2"))
    averaged = {name: value for name, value in weights.items() if name != "head.l.bias"}
    with pytest.raises(ValueError, match=r"\(net_E\) is not mobilemamba_t2"):
        verify(find("mobilemamba_t2"), saved(tmp_path / "file.pth", {"net": weights, "net_E": averaged}))


def test_a_detector_of_another_kind_is_refused(tmp_path, parity_json):
    weights = released_weights(find("retinanet"), parity_json("downstream_state_dict.json"))
    with pytest.raises(ValueError, match=r"(?s)is not maskrcnn .*roi_head 20 "):
        verify(find("maskrcnn"), saved(tmp_path / "file.pth", {"state_dict": weights}).resolve())


def test_a_changed_file_is_refused_with_both_checksums_and_the_way_out(tmp_path):
    entry = find("mobilemamba_t2")
    weights = released_weights(entry)
    file = saved(tmp_path / "file.pth", {"net": weights})
    first = verify(entry, file)
    weights["head.l.bias"] += 1
    saved(file, {"net": weights})
    with pytest.raises(
        ValueError, match="delete it and get mobilemamba_t2 again, or, if the change is meant"
    ) as caught:
        verify(entry, file)
    assert first.sha256 in str(caught.value)
    assert f"{first.size:,} bytes" in str(caught.value)
    record_path(file).unlink()
    assert verify(entry, file).sha256 != first.sha256


@pytest.mark.parametrize(
    "record", ["{}", "[]", "5", "", '{"size": null, "sha256": ""}', '{"size": 1e999, "sha256": ""}', "[" * 100_000]
)
def test_a_damaged_record_is_named(tmp_path, record):
    file = saved(tmp_path / "file.pth", {})
    record_path(file).write_text(record)
    with pytest.raises(ValueError, match=r"file\.pth\.json is damaged .*: delete it"):
        verify(find("mobilemamba_t2"), file)


def test_a_file_whose_record_cannot_be_written_is_good_all_the_same(tmp_path, monkeypatch):
    entry = find("mobilemamba_t2")
    file = saved(tmp_path / "file.pth", {"net": released_weights(entry)})

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert verify(entry, file).size == file.stat().st_size
    assert not record_path(file).exists()


class _History:
    """Like mmengine's: arrays, and its own functions, which pickle looks up by getattr."""

    def __init__(self):
        self._log_history = np.arange(3.0)
        self._count_history = np.ones(3)

    def mean(self):
        return self._log_history.mean()

    def __getstate__(self):
        return {**self.__dict__, "statistics_methods": {"mean": type(self).mean}}


@pytest.fixture
def history(monkeypatch):
    """A log history that claims to be mmengine's; the module exists only while it is saved."""
    name = "mmengine.logging.history_buffer"
    kind = type("HistoryBuffer", (_History,), {"__module__": name, "__qualname__": "HistoryBuffer"})
    kind.mean = types.FunctionType(_History.mean.__code__, globals(), "mean")
    kind.mean.__module__, kind.mean.__qualname__ = name, "HistoryBuffer.mean"
    module = types.ModuleType(name)
    module.HistoryBuffer = kind
    for parent in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    return kind()


def test_a_detectors_log_histories_are_read_past(history, tmp_path, parity_json, monkeypatch):
    entry = find("fpn")
    weights = released_weights(entry, parity_json("downstream_state_dict.json"))
    hub = {"log_scalars": {"train/loss": history}}
    file = saved(tmp_path / "file.pth", {"meta": {}, "state_dict": weights, "message_hub": hub})
    assert b"HistoryBuffer" in file.read_bytes()
    monkeypatch.delitem(sys.modules, "mmengine.logging.history_buffer")
    verify(entry, file)


def test_code_in_a_detectors_file_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return exec, (f"open({str(marker)!r}, 'w')",)

    file = saved(tmp_path / "file.pth", {"state_dict": {}, "message_hub": Payload()}, pickle_module=pickle)
    with pytest.raises(ValueError, match="holds code and was refused"):
        verify(find("fpn"), file)
    assert not marker.exists()
