"""The README's configurations of one's own classes: what they say is enough to train, and to name what is found."""

from __future__ import annotations

import json
import re

import pytest
from tool_cases import DOWNSTREAM, arguments_of, tiny

pytest.importorskip("mmcv.ops", reason="OpenMMLab is not installed: make downstream")
pytest.importorskip("mmdet.models")
pytest.importorskip("mmseg.models")

from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS

from downstream.data.synthetic import CATEGORY_IDS, GROUND_LABEL, LABELS, write_ade20k, write_coco
from downstream.hooks import check_class_counts
from downstream.tools import inference
from downstream.tools import train as training
from downstream.tools.datasets import check_datasets
from downstream.tools.settings import load_config

KINDS = ("circle", "square", "kite", "star")


@pytest.fixture
def readme(tmp_path):
    """Write the README's block that inherits from a configuration, for data in a folder: the folder -> its path."""

    def write(folder, base, root):
        blocks = re.findall(r"```python\n(.*?)```", (DOWNSTREAM / "README.md").read_text(), re.DOTALL)
        (block,) = [block for block in blocks if f'_base_ = "{base}"' in block]
        path = tmp_path / "own.py"
        path.write_text(block.replace(base, str(folder / base)).replace("data/shapes", str(root)))
        return path

    return write


@pytest.fixture
def shapes(tmp_path):
    """A data set in COCO's format of four classes of its own."""
    root = tmp_path / "shapes"
    write_coco(root, num_train=4, num_val=2, size=(64, 64))
    for path in (root / "annotations").iterdir():
        annotations = json.loads(path.read_text())
        annotations["categories"] = [
            {"id": number, "name": name} for number, name in zip(CATEGORY_IDS, KINDS, strict=True)
        ]
        path.write_text(json.dumps(annotations))
    return root


@pytest.mark.slow
def test_a_detector_trains_and_its_checkpoint_knows_the_classes(readme, shapes, tmp_path, capsys):
    path = readme(DOWNSTREAM / "det/configs/retinanet", "retinanet_mobilemamba_b1_fpn_1x_coco.py", shapes)
    options = arguments_of(tiny("retinanet", size=64))
    assert training.main([str(path), "--work-dir", str(tmp_path / "work"), *options]) == 0
    (image, *_) = sorted((shapes / "val2017").iterdir())
    arguments = [image, path, tmp_path / "work/epoch_1.pth", "--out", tmp_path / "picture.png", "--score-thr", "0"]
    capsys.readouterr()
    assert inference.main([*map(str, arguments), *options]) == 0
    found = re.findall(r"\d+ (\w+)", capsys.readouterr().out.splitlines()[-1].partition(": ")[2])
    assert found
    assert set(found) <= set(KINDS)


def test_a_segmentor_has_the_classes_of_its_label_maps(readme, tmp_path):
    write_ade20k(tmp_path / "ade", num_train=2, num_val=2, size=(64, 64))
    root = tmp_path / "ade/ADEChallengeData2016"
    path = readme(DOWNSTREAM / "seg/configs/sem_fpn", "fpn_mobilemamba_b4-160k_ade20k-512x512.py", root)
    config = load_config(str(path), {"model.backbone.pretrained": False})
    check_datasets(config, "train", "val", "test")
    init_default_scope("mmseg")
    dataset = DATASETS.build(config.train_dataloader.dataset)
    check_class_counts(MODELS.build(config.model), dataset)
    assert dataset.metainfo["classes"] == ("ground", "circle", "square")
    # 0 is no class, and 1 the first.
    labels = dataset[0]["data_samples"].gt_sem_seg.data
    assert set(labels.unique().tolist()) <= {GROUND_LABEL - 1, *(label - 1 for label in LABELS), 255}
