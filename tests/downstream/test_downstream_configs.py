"""The configurations: they load from anywhere, build, and hold the published recipe."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmcv.ops", reason="OpenMMLab is not installed: make downstream")
pytest.importorskip("mmdet.models")
pytest.importorskip("mmseg.models")
pytest.importorskip("mmpretrain.models")

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope

from downstream.forks import find_forks

ROOT = Path(__file__).resolve().parents[2]
RELEASED = ("maskrcnn", "retinanet", "ssdlite", "ssdlite_512", "deeplabv3", "fpn", "pspnet")
DETECTORS = {"maskrcnn": 2e-4, "retinanet": 2e-4, "ssdlite": 12 * 2e-4, "ssdlite_512": 12 * 2e-4}


@pytest.fixture(scope="module")
def load(parity_json):
    paths = {name: entry["config"] for name, entry in parity_json("published.json")["downstream"].items()}
    find_forks()
    return lambda name: Config.fromfile(ROOT / paths[name])


def test_they_load_in_the_folder_of_the_task(parity_json):
    folders = {"det": [], "seg": []}
    for entry in parity_json("published.json")["downstream"].values():
        folders[entry["task"]].append(entry["config"].removeprefix(f"downstream/{entry['task']}/"))
    code = "import sys, downstream; from mmengine.config import Config; [Config.fromfile(p) for p in sys.argv[1:]]"
    for task, configs in folders.items():
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, *configs]
        subprocess.run(command, cwd=ROOT / "downstream" / task, env=environment, check=True, timeout=300)


@pytest.mark.parametrize("name", RELEASED)
def test_backbone_data_and_checks(load, name):
    config = load(name)
    is_detector = name in DETECTORS
    backbone = config.model.backbone
    assert (backbone.type, backbone.variant) == ("MobileMamba", "B1" if is_detector else "B4")
    assert (backbone.pretrained, backbone.drop_path) == (True, 0.03)
    assert backbone.get("norm_eval", False) is is_detector
    assert tuple(backbone.out_indices) == ((1, 2) if name.startswith("ssd") else (1, 2, 3))
    assert config.train_dataloader.batch_size == (24 if name.startswith("ssd") else 4 if is_detector else 8)
    assert config.data_root == ("data/coco/" if is_detector else "data/ade/ADEChallengeData2016")
    assert {"ClassCountHook", "CheckpointFitHook"} <= {hook.type for hook in config.custom_hooks}


@pytest.mark.parametrize("name", RELEASED)
def test_schedule_is_constant_after_the_warm_up_then_half_a_cosine(load, name):
    config = load(name)
    base = DETECTORS.get(name, 1.2e-4)
    by_epoch = name in DETECTORS
    length = {"maskrcnn": 12, "retinanet": 12, "ssdlite": 120, "ssdlite_512": 120, "fpn": 160_000}.get(name, 80_000)
    assert (config.train_cfg.max_epochs if by_epoch else config.train_cfg.max_iters) == length
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.optim_wrapper.optimizer.lr)
    warm_up, cosine = (
        PARAM_SCHEDULERS.build(dict(entry), default_args={"optimizer": optimizer}) for entry in config.param_scheduler
    )
    (group,) = optimizer.param_groups
    start, num_warm_up = (1e-6, 1500) if name == "fpn" else (1e-5, 500)
    assert group["lr"] == pytest.approx(base * start)
    optimizer.step()
    for _ in range(num_warm_up):
        warm_up.step()
    assert group["lr"] == pytest.approx(base)
    seen = {}
    for position in range(length):
        seen[position] = group["lr"]
        cosine.step()
    half = length // 2
    for position in (0, half - 1, half, half + half // 3, length - 1):
        along = max(position - half, 0) / half
        assert seen[position] == pytest.approx(base * (1 + math.cos(math.pi * along)) / 2)


@pytest.mark.parametrize("name", ["ssdlite", "fpn"])
def test_optimizer_spares_norms_and_lets_the_segmentation_head_learn_faster(load, name):
    config = load(name)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    names = {id(parameter): entry for entry, parameter in model.named_parameters()}
    groups = {names[id(p)]: group for group in wrapper.optimizer.param_groups for p in group["params"]}
    base = DETECTORS.get(name, 1.2e-4)
    assert type(wrapper.optimizer) is torch.optim.AdamW
    for entry, group in groups.items():
        assert group["weight_decay"] == (0.0 if "norm" in entry else 0.05), entry
        assert group["lr"] == pytest.approx(10 * base if name == "fpn" and "head" in entry else base), entry
        assert tuple(group["betas"]) == (0.9, 0.999)
    assert any("out_norm" in entry for entry in groups)
    assert wrapper.clip_grad_kwargs == (None if name == "fpn" else {"max_norm": 0.1, "norm_type": 2})


def test_ssdlite_sizes_pipelines_and_test_settings(load):
    for name, size in (("ssdlite", 320), ("ssdlite_512", 512)):
        config = load(name)
        dataset = config.train_dataloader.dataset
        assert (dataset.type, dataset.times) == ("RepeatDataset", 5)
        steps = [step.type for step in dataset.dataset.pipeline]
        assert steps[2:7] == ["Expand", "MinIoURandomCrop", "Resize", "RandomFlip", "PhotoMetricDistortion"]
        for pipeline in (dataset.dataset.pipeline, config.val_dataloader.dataset.pipeline):
            (resize,) = [step for step in pipeline if step.type == "Resize"]
            assert (tuple(resize.scale), resize.keep_ratio) == ((size, size), False)
        assert config.test_dataloader.dataset.pipeline == config.val_dataloader.dataset.pipeline
        assert config.train_cfg.val_interval == 5
        assert config.auto_scale_lr.base_batch_size == 8 * 24
        anchors = config.model.bbox_head.anchor_generator
        assert list(anchors.strides) == [16, 32, 64, 107, 160, 320]
        assert list(anchors.min_sizes) == [48, 100, 150, 202, 253, 304]
        assert list(anchors.max_sizes) == [100, 150, 202, 253, 304, 320]
        assert (config.model.test_cfg.score_thr, config.model.test_cfg.max_per_img) == (0.02, 200)


def test_retinanet_has_test_time_augmentation_of_three_sizes_and_mirror_images(load):
    config = load("retinanet")
    sizes, flips, *_ = config.tta_pipeline[1].transforms
    assert config.tta_model.type == "DetTTAModel"
    assert [tuple(step.scale) for step in sizes] == [(1333, 800), (666, 400), (2000, 1200)]
    assert [step.prob for step in flips] == [1.0, 0.0]


def test_entries_can_be_overridden(load):
    config = load("ssdlite")
    config.merge_from_dict({"model.backbone.pretrained": False, "optim_wrapper.optimizer.lr": 1e-3})
    assert config.model.backbone.pretrained is False
    assert config.optim_wrapper.optimizer.lr == 1e-3
