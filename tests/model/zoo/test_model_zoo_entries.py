"""The released checkpoints: what is listed, and where their files are."""

from __future__ import annotations

import json

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


def listing():
    """Return a list of checkpoints of the user's own."""
    return {
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


def refused(tmp_path, contents):
    """Return the message with which a list is refused."""
    file = tmp_path / "bad.json"
    file.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    with pytest.raises(ValueError, match=r"bad\.json: ") as caught:
        read_zoo(file)
    return str(caught.value)


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
    zoo = listing()
    (tmp_path / "good.json").write_text(json.dumps(zoo))
    assert local_path(read_zoo(tmp_path / "good.json")["mine"]) == tmp_path / "mine.pth"
    change(zoo)
    assert message in refused(tmp_path, zoo)


@pytest.mark.parametrize("key", ["path", "config"])
@pytest.mark.parametrize(
    "value",
    [
        "/tmp/a.pth",
        "../a.pth",
        "weights/../../a.pth",
        "..",
        "",
        "C:\\a.pth",
        "C:a.pth",
        "\\\\host\\a",
        "a\n.pth",
        "..\\a",
    ],
)
def test_a_path_out_of_its_folder_is_refused(tmp_path, key, value):
    zoo = listing()
    zoo["models"]["mine"][key] = value
    assert f"mine: {key} {value!r} is refused: expected a relative path" in refused(tmp_path, zoo)


@pytest.mark.parametrize("name", ["../mine", "a/b", "/mine", "..", "", "a\x1b[2J"])
@pytest.mark.parametrize("part", ["datasets", "models"])
def test_a_name_that_is_a_path_is_refused(tmp_path, part, name):
    zoo = listing()
    zoo[part][name] = zoo[part].pop("mine")
    zoo["models"]["mine" if part == "datasets" else name]["dataset"] = name if part == "datasets" else "mine"
    assert f"the name {name!r} is refused" in refused(tmp_path, zoo)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("models", {"path": 5}, "path 5, expected a text"),
        ("models", {"path": ["a.pth"]}, "path ['a.pth'], expected a text"),
        ("models", {"config": None}, "config None, expected a text"),
        ("models", {"dataset": ["mine"]}, "dataset ['mine'], expected the name of a dataset"),
        ("models", {"published": 71.5}, "published 71.5, expected an object, each of its values a finite number"),
        ("models", {"published": {"top1": "71"}}, "published {'top1': '71'}, expected an object"),
        ("models", {"published": {"top1": float("nan")}}, "a finite number"),
        ("models", {"published": {"mAP": 3.0}}, "published 'mAP', expected top1 or top5"),
        ("models", {"overrides": "size=192"}, "overrides 'size=192', expected a list, each element a text"),
        (
            "models",
            {"also_known": {"top1": 3}},
            "also_known {'top1': 3}, expected an object, each of its values a list",
        ),
        ("models", {"size": "12"}, "size '12', expected a whole number from 0 or null"),
        ("models", {"size": -1}, "size -1"),
        ("models", {"size": True}, "size True"),
        ("models", {"sha256": "abc"}, "sha256 'abc'"),
        ("models", {"url": "file:///etc/passwd"}, "url 'file:///etc/passwd'"),
        ("models", {"drive_id": "../x"}, "drive_id '../x'"),
        ("models", {"folder": "/tmp"}, "unknown key 'folder'"),
        ("datasets", {"num_images": "3"}, "num_images '3', expected a whole number"),
        ("datasets", {"num_classes": 2.5}, "num_classes 2.5"),
        ("datasets", {"tolerance": None}, "tolerance None, expected a finite number"),
        ("datasets", {"image_names": "{0.__class__}"}, "image_names '{0.__class__}'"),
    ],
)
def test_a_value_of_another_type_or_form_is_refused(tmp_path, part, values, message):
    zoo = listing()
    zoo[part]["mine"].update(values)
    assert message in refused(tmp_path, zoo)


@pytest.mark.parametrize("values", [None, 5, "mine.pth", ["mine.pth"]])
@pytest.mark.parametrize("part", ["datasets", "models"])
def test_an_entry_that_is_no_object_is_refused(tmp_path, part, values):
    zoo = listing()
    zoo[part]["mine"] = values
    assert f"mine is {values!r}, expected an object" in refused(tmp_path, zoo)


@pytest.mark.parametrize("contents", ["", "{", "[" * 100_000, "\ud800"], ids=["empty", "cut", "nested", "surrogate"])
def test_a_file_that_is_no_json_is_refused(tmp_path, contents):
    (tmp_path / "bad.json").write_bytes(contents.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"bad\.json: no list of checkpoints"):
        read_zoo(tmp_path / "bad.json")


def test_checkpoints_are_in_the_repository_or_else_in_torch_hubs_folder(weights_folder, monkeypatch):
    entry = find("maskrcnn")
    assert local_path(entry) == weights_folder / "downstream" / "det" / "maskrcnn.pth"
    (weights_folder / "README.md").unlink()
    monkeypatch.setenv("TORCH_HOME", "/cache")
    monkeypatch.setattr("torch.hub._hub_dir", None)
    assert str(local_path(entry)) == "/cache/hub/checkpoints/mobilemamba/downstream/det/maskrcnn.pth"
