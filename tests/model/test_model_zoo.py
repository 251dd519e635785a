"""The released checkpoints: what is listed, where they lie, and what a file must hold."""

from __future__ import annotations

import json
import pickle
import re
import sys
import types

import numpy as np
import pytest
import torch

from model.mobilemamba import variant_shapes
from model.zoo import find, local_path, models_of, read_zoo, released_entry, verify
from model.zoo.verification import DOWNSTREAM_ENTRIES, record_path


def released_weights(entry, downstream=None):
    """Return zeros under the names that a released file has."""
    shapes = variant_shapes()[entry.network]
    if entry.task != "imagenet":
        backbone = {f"backbone.{name}": shape for name, shape in shapes.items() if not name.startswith("head.")}
        shapes = {**backbone, **downstream[entry.name]["not_backbone"]}
    return {name: torch.zeros(tuple(shape)) for name, shape in shapes.items()}


def saved(file, contents, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(contents, file, **options)
    return file


# ---- the list


def test_every_published_figure_source_and_place_is_listed(parity_json):
    published = parity_json("published.json")
    models = read_zoo()
    assert list(models) == [*published["imagenet"], *published["downstream"]]
    for name, facts in {**published["imagenet"], **published["downstream"]}.items():
        entry = models[name]
        assert (entry.path, entry.config, entry.drive_id) == (facts["path"], facts["config"], facts["drive_id"])
        assert (entry.params, entry.macs) == (facts["params"], facts["flops"])
        assert entry.task == facts.get("task", "imagenet")
        assert entry.published == facts.get("metrics", {"top1": facts.get("top1"), "top5": facts.get("top5")})
        assert entry.in_table.get("top1") == facts.get("table_top1")
    assert models["mobilemamba_t2"].also_known == {"top1": [73.634]}
    assert not any(entry.also_known for name, entry in models.items() if name != "mobilemamba_t2")


def test_names_are_found_in_any_case_in_groups_and_each_once():
    assert find("MobileMamba_T2s").name == "mobilemamba_t2s"
    assert [entry.name for entry in models_of(["seg", "maskrcnn", "fpn"])] == ["fpn", "deeplabv3", "pspnet", "maskrcnn"]
    assert len(models_of(["imagenet"])) == 12
    assert len(models_of(["all"])) == 19


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"no released checkpoint 'mobilmamba_b4s'; the nearest is 'mobilemamba_b4s'"):
        find("mobilmamba_b4s")


def test_each_variant_has_its_own_and_its_distilled_checkpoint():
    assert released_entry("MobileMamba_B1").name == "mobilemamba_b1"
    assert released_entry("mobilemamba_b1", "MobileMamba_B1s").name == "mobilemamba_b1s"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda zoo: zoo["models"]["mine"].update(flops="1G"), "unknown key 'flops'"),
        (lambda zoo: zoo["models"]["mine"].pop("config"), "config"),
        (lambda zoo: zoo["models"]["mine"].update(network="MobileMamba_T3"), "'MobileMamba_T3', expected one of"),
        (lambda zoo: zoo["models"]["mine"].update(dataset="imagenet"), "data set 'imagenet', which is not listed"),
        (lambda zoo: zoo["models"]["mine"].update(task="det"), "'entries' belongs to"),
        (lambda zoo: zoo.pop("datasets"), "expected an object with the objects"),
    ],
)
def test_a_faulty_list_of_ones_own_is_refused(tmp_path, change, message):
    zoo = {
        "datasets": {"mine": {"title": "Mine", "num_images": 3, "num_classes": 3, "tolerance": 0.1}},
        "models": {
            "mine": {
                "task": "imagenet",
                "dataset": "mine",
                "network": "MobileMamba_T2",
                "path": "mine.pth",
                "config": "configs/mobilemamba/mobilemamba_t2",
                "published": {"top1": 50.0, "top5": 100.0},
            }
        },
    }
    (tmp_path / "good.json").write_text(json.dumps(zoo))
    assert local_path(read_zoo(tmp_path / "good.json")["mine"]) == tmp_path / "mine.pth"
    change(zoo)
    (tmp_path / "bad.json").write_text(json.dumps(zoo))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_zoo(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value)


# ---- places


def test_checkpoints_lie_in_the_repository_and_else_in_torch_hub(weights_folder, monkeypatch):
    entry = find("maskrcnn")
    assert local_path(entry) == weights_folder / "downstream" / "det" / "maskrcnn.pth"
    (weights_folder / "README.md").unlink()
    monkeypatch.setenv("TORCH_HOME", "/cache")
    monkeypatch.setattr("torch.hub._hub_dir", None)
    assert str(local_path(entry)) == "/cache/hub/checkpoints/mobilemamba/downstream/det/maskrcnn.pth"


# ---- what a file must hold


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


def test_averaged_weights_beside_the_plain_ones_are_verified_too(tmp_path):
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


def test_a_damaged_record_is_named(tmp_path):
    file = saved(tmp_path / "file.pth", {})
    record_path(file).write_text("{}")
    with pytest.raises(ValueError, match=r"file\.pth\.json is damaged .*: delete it"):
        verify(find("mobilemamba_t2"), file)


def test_a_file_that_cannot_be_recorded_beside_is_good_all_the_same(tmp_path, monkeypatch):
    entry = find("mobilemamba_t2")
    file = saved(tmp_path / "file.pth", {"net": released_weights(entry)})

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert verify(entry, file).size == file.stat().st_size
    assert not record_path(file).exists()


# ---- what mmengine keeps beside the weights


class _History:
    """As mmengine's: arrays, and functions of its own that pickle looks up by getattr."""

    def __init__(self):
        self._log_history = np.arange(3.0)
        self._count_history = np.ones(3)

    def mean(self):
        return self._log_history.mean()

    def __getstate__(self):
        return {**self.__dict__, "statistics_methods": {"mean": type(self).mean}}


@pytest.fixture
def history(monkeypatch):
    """A log history that says it is mmengine's, with the module there only to save it."""
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
