"""Training, testing, resuming and drawing, end to end on synthetic data: each configuration's model and pipeline."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat

import numpy as np
import pytest
from PIL import Image
from tool_cases import (
    CONFIGS,
    DETECTORS,
    arguments_of,
    metrics,
    run_python,
    run_script,
    scalars,
    task_of,
    tiny,
)

from downstream.data.synthetic import write_ade20k, write_coco

pytest.importorskip("mmdet", reason="needs OpenMMLab: make downstream")
pytest.importorskip("mmseg", reason="needs OpenMMLab: make downstream")

from downstream.loading import load_local_checkpoint

pytestmark = pytest.mark.slow

SIZE = (96, 96)
LEARNING_SIZE = 128


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Both synthetic sets, in a folder whose name holds a space: the task's name -> root."""
    folder = tmp_path_factory.mktemp("synthetic data")
    write_coco(folder / "coco", num_train=8, num_val=4, size=SIZE)
    write_ade20k(folder / "ade20k", num_train=8, num_val=4, size=SIZE)
    return {"det": folder / "coco", "seg": folder / "ade20k" / "ADEChallengeData2016"}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Train a model for a few steps on two processes, once: its name -> the folder of the run."""
    folders = {}

    def train(name):
        if name not in folders:
            work_dir = tmp_path_factory.mktemp("work dir") / name
            options = ("--work-dir", work_dir, "--data-root", data[task_of(name)], *arguments_of(tiny(name)))
            done = run_script(task_of(name), "dist_train.sh", CONFIGS[name], 2, *options)
            assert done.returncode == 0, done.stderr
            folders[name] = work_dir
        return folders[name]

    return train


def last_checkpoint(work_dir):
    return (work_dir / "last_checkpoint").read_text().strip()


def validated(work_dir):
    """The figures of the last validation in training."""
    (path,) = work_dir.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in path.read_text().splitlines() if "aAcc" in line or "bbox_mAP" in line][-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_train_and_test_on_two_processes(trained, data, tmp_path, name):
    work_dir = trained(name)
    losses = [record["loss"] for record in scalars(work_dir)]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    figures = {"bbox_mAP"} if name in DETECTORS else {"mIoU", "aAcc", "mAcc"}
    figures |= {"segm_mAP"} if name == "maskrcnn" else set()
    kept = tmp_path / ("found.pkl" if name in DETECTORS else "found")
    options = ("--work-dir", tmp_path / "test", "--data-root", data[task_of(name)], "--out", kept)
    done = run_script(
        task_of(name), "dist_test.sh", CONFIGS[name], last_checkpoint(work_dir), 2, *options, *arguments_of(tiny(name))
    )
    assert done.returncode == 0, done.stderr
    found = {key.rpartition("/")[2]: value for key, value in metrics(tmp_path / "test").items()}
    assert figures <= set(found)
    if name in DETECTORS:
        assert len(pickle.loads(kept.read_bytes())) == 4
    else:
        assert len(list(kept.iterdir())) == 4
        # The last validation of training saw the same weights.
        assert found["aAcc"] == pytest.approx(validated(work_dir)["aAcc"])


def test_resuming_continues_the_schedule(trained, data, tmp_path):
    options = tiny("fpn") | {"train_cfg.max_iters": 4, "train_cfg.val_interval": 4}
    whole, work_dir = tmp_path / "whole", shutil.copytree(trained("fpn"), tmp_path / "resumed")
    for folder, more in ((whole, ()), (work_dir, ("--resume",))):
        arguments = ("--work-dir", folder, "--data-root", data["seg"], *more, *arguments_of(options))
        done = run_script("seg", "dist_train.sh", CONFIGS["fpn"], 2, *arguments)
        assert done.returncode == 0, done.stderr
    assert "resumed epoch: 0, iter: 2" in done.stdout
    expected, resumed = scalars(whole), scalars(work_dir)
    assert [record["iter"] for record in resumed] == [3, 4]
    assert [record["lr"] for record in resumed] == [record["lr"] for record in expected[2:]]
    assert resumed[0]["lr"] > expected[0]["lr"]  # warming up
    states = load_local_checkpoint(last_checkpoint(work_dir))["optimizer"]["state"].values()
    assert {float(state["step"]) for state in states} == {4.0}


def test_a_checkpoint_of_another_model_on_two_processes(trained, data, tmp_path):
    checkpoint = last_checkpoint(trained("retinanet"))
    options = ("--work-dir", tmp_path, "--data-root", data["det"], *arguments_of(tiny("ssdlite")))
    done = run_script("det", "dist_test.sh", CONFIGS["ssdlite"], checkpoint, 2, *options)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert f"{checkpoint} (state_dict) does not fit SingleStageDetector" in done.stderr
    assert "unexpected in the file: " in done.stderr


def test_missing_data_on_two_processes(tmp_path):
    (tmp_path / "empty").mkdir()
    done = run_script("det", "dist_train.sh", CONFIGS["retinanet"], 2, "--data-root", tmp_path / "empty")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert f"missing: {tmp_path}/empty/train2017" in done.stderr


def test_retinanet_with_test_time_augmentation_on_one_process(trained, data, tmp_path):
    options = tiny("retinanet")
    options |= {
        f"tta_pipeline.1.transforms.0.{index}.scale": f"({size},{size})" for index, size in enumerate((96, 64, 128))
    }
    arguments = ("--tta", "--work-dir", tmp_path, "--data-root", data["det"], *arguments_of(options))
    done = run_script("det", "dist_test.sh", CONFIGS["retinanet"], last_checkpoint(trained("retinanet")), 0, *arguments)
    assert done.returncode == 0, done.stderr
    assert any(key.endswith("bbox_mAP") for key in metrics(tmp_path))


@pytest.mark.parametrize("name", ["maskrcnn", "fpn"])
def test_a_picture_of_one_image(trained, data, tmp_path, name):
    split = "val2017" if name == "maskrcnn" else "images/validation"
    image = sorted((data[task_of(name)] / split).iterdir())[0]
    out = tmp_path / "a picture.png"
    arguments = (image, CONFIGS[name], last_checkpoint(trained(name)), "--out", out, "--score-thr", "0")
    done = run_python(task_of(name), "inference.py", *arguments, *arguments_of(tiny(name)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{out}: ")
    drawn, plain = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (out, image))
    assert drawn.shape[0] >= SIZE[0]
    assert drawn.shape != plain.shape or np.abs(drawn - plain).max() > 20


def test_slurm_processes_on_the_cpu(data, tmp_path):
    """The job step's processes, started by a stand-in for srun that sets what SLURM would."""
    srun = tmp_path / "srun"
    srun.write_text(
        "#!/usr/bin/env bash\n"
        "while [[ $1 != */python* ]]; do shift; done\n"
        "export SLURM_NTASKS=2 MASTER_ADDR=127.0.0.1\n"
        'SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!\n'
        'SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!\n'
        "wait $first && wait $second\n"
    )
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GPUS": "2", "GPUS_PER_NODE": "0", "PORT": "29613"}
    arguments = ("part", "job", CONFIGS["ssdlite"], tmp_path / "work dir", "--data-root", data["det"])
    done = run_script("det", "slurm_train.sh", *arguments, *arguments_of(tiny("ssdlite")), env=env)
    assert done.returncode == 0, done.stderr
    assert len(scalars(tmp_path / "work dir")) == 2


def test_flops_are_counted():
    done = run_python("seg", "get_flops.py", CONFIGS["pspnet"])
    assert done.returncode == 0, done.stderr
    assert "21,469,669" in done.stdout


def learn(name, data, work_dir, options):
    """Train from random weights on two processes, four images each, and return the last figures of the evaluator."""
    options = tiny(name, size=LEARNING_SIZE, images=4) | {"default_hooks.logger.interval": 10} | options
    arguments = ("--work-dir", work_dir, "--data-root", data, *arguments_of(options))
    done = run_script(task_of(name), "dist_train.sh", CONFIGS[name], 2, *arguments, timeout=1500)
    assert done.returncode == 0, done.stderr
    return validated(work_dir)


def test_semantic_fpn_learns(tmp_path):
    """The mean is over the five classes that occur, of 150, and those that the model gives wrongly."""
    write_ade20k(tmp_path / "data", num_train=64, num_val=16, size=(LEARNING_SIZE, LEARNING_SIZE))
    options = {
        "train_cfg.max_iters": 100,
        "train_cfg.val_interval": 100,
        "default_hooks.checkpoint.interval": 100,
        "optim_wrapper.optimizer.lr": 5e-4,
        "param_scheduler.0.end": 15,
        "param_scheduler.1.begin": 50,
        "param_scheduler.1.T_max": 50,
        "param_scheduler.1.end": 100,
    }
    figures = learn("fpn", tmp_path / "data" / "ADEChallengeData2016", tmp_path / "work", options)
    assert figures["mIoU"] > 50


def test_ssdlite_learns(tmp_path):
    """Boxes and classes of images that it did not train on."""
    write_coco(tmp_path / "data", num_train=64, num_val=16, size=(LEARNING_SIZE, LEARNING_SIZE))
    options = {
        "train_cfg.max_epochs": 16,
        "train_cfg.val_interval": 16,
        "optim_wrapper.optimizer.lr": 1e-3,
        "param_scheduler.0.end": 20,
        "param_scheduler.1.begin": 8,
        "param_scheduler.1.T_max": 8,
        "param_scheduler.1.end": 16,
    }
    figures = learn("ssdlite", tmp_path / "data", tmp_path / "work", options)
    assert figures["coco/bbox_mAP_50"] > 0.3
