"""Detectors and segmentors: a stand-in for their tool leaves the metrics as mmengine does."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import torch

from model.mobilemamba import variant_shapes
from model.zoo import find
from weights import check

COCO = {
    "coco/bbox_mAP": 0.396,
    "coco/bbox_mAP_50": 0.598,
    "coco/bbox_mAP_75": 0.424,
    "coco/bbox_mAP_s": 0.215,
    "coco/bbox_mAP_m": 0.434,
    "coco/bbox_mAP_l": 0.539,
    "data_time": 0.1,
    "time": 0.2,
}
ADE20K = {"aAcc": 79.93, "mIoU": 42.46, "mAcc": 53.74, "data_time": 0.1, "time": 0.2}
TOOL = """#!/usr/bin/env bash
set -eu
echo "$PWD $*" > {calls}
echo "the tool speaks"
[ -z "{fails}" ] || exit 3
while [ "$1" != --work-dir ]; do shift; done
mkdir -p "$2/20260101_000000/vis_data"
cp {metrics} "$2/20260101_000000/20260101_000000.json"
echo '{{"step": 1}}' > "$2/20260101_000000/vis_data/scalars.json"
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory, parity_json) -> Path:
    """Two checkpoints, and ADE20K without its pictures' contents."""
    folder = tmp_path_factory.mktemp("material")
    shapes = variant_shapes()["MobileMamba_B1"]
    backbone = {f"backbone.{name}": shape for name, shape in shapes.items() if not name.startswith("head.")}
    for name in ("retinanet", "fpn"):
        entries = {**backbone, **parity_json("downstream_state_dict.json")[name]["not_backbone"]}
        weights = {key: torch.zeros(tuple(shape)) for key, shape in entries.items()}
        torch.save({"meta": {}, "state_dict": weights}, folder / f"{name}.pth")
    pictures = folder / "ADEChallengeData2016" / "images" / "validation"
    pictures.mkdir(parents=True)
    for number in range(2000):
        (pictures / f"ADE_val_{number:08d}.jpg").touch()
    return folder


@pytest.fixture
def repository(tmp_path, weights_folder, material, monkeypatch) -> Path:
    """A repository with two checkpoints, synthetic COCO and ADE20K next to it, and OpenMMLab as good as installed."""
    monkeypatch.setattr("weights.detectors.ROOT", weights_folder.parent)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.SimpleNamespace(name=name))
    for name in ("retinanet", "fpn"):
        file = weights_folder.parent / find(name).path
        file.parent.mkdir(parents=True)
        file.symlink_to(material / f"{name}.pth")
    write_coco(tmp_path / "coco")
    (tmp_path / "ade").symlink_to(material)
    return weights_folder.parent


def write_coco(root: Path, *, num_images: int = 5000, num_categories: int = 80) -> None:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    contents = {"images": [{}] * num_images, "categories": [{}] * num_categories, "annotations": []}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(contents))


def write_tool(repository: Path, task: str, metrics: dict, *, fails: bool = False) -> Path:
    """Write a tool that records how it was called; return the record."""
    folder = repository / "downstream" / task / "tools"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    record = folder / "calls.txt"
    text = TOOL.format(calls=record, metrics=folder / "metrics.json", fails="yes" if fails else "")
    (folder / "dist_test.sh").write_text(text)
    (folder / "dist_test.sh").chmod(0o755)
    return record


def run(tmp_path: Path, *names: str) -> tuple[int, dict]:
    places = ["--coco", str(tmp_path / "coco"), "--ade20k", str(tmp_path / "ade"), "--gpus", "2"]
    code = check.main([*names, *places, "--results", str(tmp_path / "results"), "--device", "cpu"])
    reports = list((tmp_path / "results").glob("*/check.json"))
    return code, json.loads(reports[0].read_text()) if reports else {}


def test_a_detector_and_a_segmentor_pass_on_the_published_figures(repository, tmp_path):
    records = [write_tool(repository, "det", COCO), write_tool(repository, "seg", ADE20K)]
    code, report = run(tmp_path, "retinanet", "fpn")
    assert code == 0
    assert [(result["name"], result["verdict"], result["num_images"]) for result in report["results"]] == [
        ("retinanet", "pass", 5000),
        ("fpn", "pass", 2000),
    ]
    assert [len(result["figures"]) for result in report["results"]] == [6, 3]
    assert report["results"][0]["figures"][0]["measured"] == pytest.approx(39.6)
    detector, segmentor = (record.read_text().split() for record in records)
    assert detector[0] == str(repository / "downstream" / "det")
    assert detector[1] == str(repository / find("retinanet").config)
    assert Path(detector[2]).samefile(repository / find("retinanet").path)
    assert detector[3] == "2"
    assert detector[detector.index("--data-root") + 1] == str(tmp_path / "coco")
    assert Path(segmentor[segmentor.index("--data-root") + 1]).name == "ADEChallengeData2016"


def test_a_wrong_figure_fails_with_exit_code_1(repository, tmp_path):
    write_tool(repository, "det", {**COCO, "coco/bbox_mAP_75": 0.422})
    code, report = run(tmp_path, "retinanet")
    assert code == 1
    assert [figure["verdict"] for figure in report["results"][0]["figures"]] == ["pass"] * 2 + ["FAIL"] + ["pass"] * 3


def test_a_part_of_the_set_is_not_judged(repository, tmp_path):
    write_tool(repository, "det", {**COCO, "coco/bbox_mAP": 0.1})
    write_coco(tmp_path / "coco", num_images=8)
    code, report = run(tmp_path, "retinanet")
    assert (code, report["results"][0]["verdict"]) == (0, "not judged")
    assert report["results"][0]["doubts"] == ["8 images, where COCO val2017 has 5,000: a subset"]


def test_a_tool_that_fails_is_noted_and_the_others_are_measured(repository, tmp_path):
    write_tool(repository, "det", COCO, fails=True)
    write_tool(repository, "seg", ADE20K)
    code, report = run(tmp_path, "retinanet", "fpn")
    assert code == 2
    assert "dist_test.sh failed with exit code 3" in report["errors"][0]
    assert [result["name"] for result in report["results"]] == ["fpn"]


def test_metrics_that_are_missing_are_named(repository, tmp_path):
    write_tool(repository, "det", {"coco/bbox_mAP": 0.396})
    code, report = run(tmp_path, "retinanet")
    assert code == 2
    assert "gave no bbox_mAP_50, only bbox_mAP" in report["errors"][0]


def test_without_openmmlab_the_way_out_is_named(repository, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, report = run(tmp_path, "fpn")
    assert code == 2
    assert "fpn needs OpenMMLab's mmengine, mmcv, mmseg: `make downstream`" in report["errors"][0]


def test_a_folder_that_is_not_there_is_named(repository, tmp_path, capsys):
    write_tool(repository, "seg", ADE20K)
    assert check.main(["fpn", "--results", str(tmp_path), "--device", "cpu"]) == 2
    assert "say where ADE20K validation lies with --ade20k" in capsys.readouterr().out


def test_under_a_launcher_detectors_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("util.errors.PATIENCE_SECONDS", 0.1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    assert check.main(["det"]) == 2
    assert "start their own processes" in capsys.readouterr().err
