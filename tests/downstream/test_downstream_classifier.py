"""The backbone in mmpretrain, on class folders, and its weights handed on to a detector's backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmcv.ops", reason="OpenMMLab is not installed: make downstream")
pytest.importorskip("mmpretrain.models")

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from downstream.backbone import MobileMambaBackbone
from downstream.tools import get_flops, inference
from model import create_model

CONFIG = Path(__file__).resolve().parents[2] / "downstream/cls/configs/mobilemamba_b1_class-folders.py"
COLOURS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (220, 30, 20)}


@pytest.fixture
def config(tmp_path):
    """The configuration, made small: T2, three colours, one epoch."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = np.clip(np.array(colour) + rng.normal(0, 20, (72, 80, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    config = Config.fromfile(CONFIG)
    config.merge_from_dict(
        {
            "model.backbone.variant": "T2",
            "model.head.in_channels": 368,
            "model.head.num_classes": 3,
            "val_evaluator.topk": (1,),
            "test_evaluator.topk": (1,),
            "train_cfg.max_epochs": 1,
            "env_cfg.dist_cfg.backend": "gloo",
            "work_dir": str(tmp_path / "run"),
            **{f"{split}_dataloader.dataset.data_root": str(tmp_path) for split in ("train", "val", "test")},
            **{f"{split}_dataloader.batch_size": 6 for split in ("train", "val", "test")},
            **{f"{split}_dataloader.num_workers": 0 for split in ("train", "val", "test")},
            **{f"{split}_dataloader.persistent_workers": False for split in ("train", "val", "test")},
        }
    )
    config.param_scheduler = None  # the warm-up alone takes 20 epochs
    return config


def test_classifier_builds_and_answers_for_every_class(config):
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, 64, 64), mode="tensor").shape == (2, 3)
    assert not [entry for entry in model.state_dict() if entry.startswith("backbone.head")]


def test_training_on_class_folders_makes_a_pretrained_backbone(config, capsys):
    runner = Runner.from_cfg(config)
    runner.train()
    assert runner.val_evaluator.dataset_meta["classes"] == tuple(sorted(COLOURS))
    backbone = MobileMambaBackbone("T2", pretrained=str(Path(config.work_dir) / "epoch_1.pth"))
    backbone.init_weights()
    trained = runner.model.backbone.state_dict()
    assert all(value.equal(trained[entry]) for entry, value in backbone.state_dict().items())
    assert_answer_names_the_classes(config, capsys)


def assert_answer_names_the_classes(config, capsys):
    """The tool for one image takes their names, which the configuration does not hold, from the checkpoint."""
    folder = Path(config.work_dir)
    config.dump(folder / "config.py")
    image = Path(config.val_dataloader.dataset.data_root) / "val/red/0.png"
    out = folder / "picture.png"
    capsys.readouterr()
    arguments = [image, folder / "config.py", folder / "epoch_1.pth", "--out", out]
    assert inference.main([str(argument) for argument in arguments]) == 0
    answers = capsys.readouterr().out.splitlines()[-1].removeprefix(f"{out}: ").split(", ")
    names, scores = zip(*(answer.split(" ") for answer in answers), strict=True)
    assert sorted(names) == sorted(COLOURS)
    assert sum(map(float, scores)) == pytest.approx(1, abs=0.02)
    assert np.asarray(Image.open(out)).shape[:2] == (72, 80)


def test_flops_are_counted(config, capsys, tmp_path):
    config.dump(tmp_path / "config.py")
    assert get_flops.main([str(tmp_path / "config.py"), "--shape", "192"]) == 0
    parameters, macs = capsys.readouterr().out.splitlines()
    expected = sum(parameter.numel() for parameter in create_model("MobileMamba_T2", num_classes=3).parameters())
    # The classifier of mmpretrain is a linear layer too, but ours has a batch norm before it.
    assert abs(int(parameters.split()[0].replace(",", "")) - expected) <= 2 * 368
    assert float(macs.split()[0]) == pytest.approx(0.255, rel=0.02)


def test_wrong_class_count_stops_before_the_first_step(config):
    config.model.head.num_classes = 5
    message = (
        r"head has num_classes=5, but CustomDataset has 3 classes \(blue, green, red\): set model.head.num_classes=3"
    )
    with pytest.raises(ValueError, match=message):
        Runner.from_cfg(config).train()
