"""The released checkpoints: what is listed, and where their files are."""

from __future__ import annotations

import json
import re

import pytest

from model.zoo import find, local_path, models_of, read_zoo, released_entry


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
def test_a_faulty_list_of_the_users_own_is_refused(tmp_path, change, message):
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


def test_checkpoints_are_in_the_repository_or_else_in_torch_hubs_folder(weights_folder, monkeypatch):
    entry = find("maskrcnn")
    assert local_path(entry) == weights_folder / "downstream" / "det" / "maskrcnn.pth"
    (weights_folder / "README.md").unlink()
    monkeypatch.setenv("TORCH_HOME", "/cache")
    monkeypatch.setattr("torch.hub._hub_dir", None)
    assert str(local_path(entry)) == "/cache/hub/checkpoints/mobilemamba/downstream/det/maskrcnn.pth"
