"""The tools' command lines: what is refused, in one message, and what the shell scripts hand on."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tool_cases import DOWNSTREAM, REPOSITORY, arguments_of, run_script, tiny

from downstream.data.synthetic import write_ade20k, write_coco

pytest.importorskip("mmdet", reason="needs OpenMMLab: make downstream")
pytest.importorskip("mmseg", reason="needs OpenMMLab: make downstream")

from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.hooks import IterTimerHook, LoggerHook
from mmengine.runner import Runner
from mmseg.visualization import SegLocalVisualizer

from downstream.tools import export as exporting
from downstream.tools import get_flops, inference
from downstream.tools import test as testing
from downstream.tools import train as training
from downstream.tools.arguments import parse_run, run_parser
from downstream.tools.datasets import check_datasets, read_categories
from downstream.tools.errors import InputError, exit_code_of
from downstream.tools.processes import leave_processes, log_once, prepare_processes
from downstream.tools.settings import load_config, set_data_root
from model.checkpoint import read_checkpoint
from util.cores import CHOICES

RETINANET = str(DOWNSTREAM / "det/configs/retinanet/retinanet_mobilemamba_b1_fpn_1x_coco")
MASK_RCNN = str(DOWNSTREAM / "det/configs/mask_rcnn/mask-rcnn_mobilemamba_b1_fpn_1x_coco.py")
SSDLITE = str(DOWNSTREAM / "det/configs/ssd/ssdlite_mobilemamba_b1_8gpu_2lr_coco.py")
SEMANTIC_FPN = str(DOWNSTREAM / "seg/configs/sem_fpn/fpn_mobilemamba_b4-160k_ade20k-512x512.py")

# In a process that PyTorch has given two threads before it was left one core.
ONE_CORE = """
import os, sys, torch
from mmengine.config import Config
torch.set_num_threads(2)
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
from downstream.tools.processes import build_runner
build_runner(Config({"model": {"type": "BaseDataPreprocessor"}, "work_dir": sys.argv[1]}))
print(torch.get_num_threads())
"""


@pytest.fixture(autouse=True)
def own_visualizers(monkeypatch):
    """One process is one run, but here: a run's visualiser would write into the folder of the run before."""
    for kind in (DetLocalVisualizer, SegLocalVisualizer):
        monkeypatch.setattr(kind, "_instance_dict", {})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of both synthetic sets, its name holding a space."""
    folder = tmp_path_factory.mktemp("synthetic data")
    write_coco(folder / "coco", num_train=4, num_val=2, size=(64, 64))
    write_ade20k(folder / "ade20k", num_train=4, num_val=2, size=(64, 64))
    return folder


@pytest.fixture
def coco(data, tmp_path):
    return shutil.copytree(data / "coco", tmp_path / "my coco")


@pytest.fixture
def ade20k(data, tmp_path):
    return shutil.copytree(data / "ade20k", tmp_path / "my ade") / "ADEChallengeData2016"


def parsed(*arguments):
    return parse_run(run_parser("test"), ["config.py", *arguments])


def said(capsys, main, *arguments):
    """Return the one message of a tool that refuses its input."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


class TestOptions:
    def test_values_with_spaces_stay_whole(self):
        options = parsed("--cfg-options", "a.path=/my data/coco", "b=1", "c=[1, 2]", "d=(x,y)", "e=k=v").cfg_options
        assert options == {"a.path": "/my data/coco", "b": 1, "c": [1, 2], "d": ("x", "y"), "e": "k=v"}

    def test_lists_of_mappings(self):
        value = "[{'type': 'LinearLR', 'end': 50, 'by_epoch': False}, {'type': 'MultiStepLR', 'milestones': [3]}]"
        options = parsed("--cfg-options", f"param_scheduler={value}", "a=1").cfg_options
        assert options["a"] == 1
        config = load_config(RETINANET, {"param_scheduler": options["param_scheduler"]})
        assert [(step.type, step.get("end")) for step in config.param_scheduler] == [
            ("LinearLR", 50),
            ("MultiStepLR", None),
        ]

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("[dict(type='LinearLR',end=50)]", "cannot be read: write mappings as {'type': 'LinearLR', 'end': 500}"),
            ("[{'type':'LinearLR'", "cannot be read"),
            ("[1,(2]", "Imbalanced brackets"),
        ],
    )
    def test_a_value_that_cannot_be_read(self, capsys, value, message):
        with pytest.raises(SystemExit, match="2"):
            parsed("--cfg-options", f"param_scheduler={value}")
        error = capsys.readouterr().err.splitlines()[-1]
        assert "error: --cfg-options" in error
        assert message in error

    def test_a_value_without_a_key(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            parsed("--cfg-options", "a=1", "lonely")
        assert "'lonely' is not of the form KEY=VALUE" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("optim_wrapper.optimizer.lrr", "there is no entry lrr; the nearest is lr"),
            ("train_cfg.max_epoch", "there is no entry max_epoch; the nearest is max_epochs"),
            ("train_dataloader.batchsize", "there is no entry batchsize; the nearest is batch_size"),
            ("randomnes.seed", "there is no entry randomnes; the nearest is randomness"),
            ("model.backbone.frozen_stage", "there is no entry frozen_stage; the nearest is frozen_stages"),
            ("param_scheduler.9.begin", "param_scheduler is a list of 2"),
            ("train_cfg.max_epochs.value", "train_cfg.max_epochs is 12 and has no entries"),
        ],
    )
    def test_a_typo_is_refused(self, option, message):
        with pytest.raises(InputError, match=message):
            load_config(RETINANET, {option: 1})

    def test_entries_that_can_be_added(self):
        options = {
            "randomness.seed": 3,
            "model.backbone.frozen_stages": 1,
            "train_dataloader.pin_memory": True,
            "optim_wrapper.accumulative_counts": 2,
            "find_unused_parameters": True,
            "param_scheduler.0.end": 10,
        }
        config = load_config(RETINANET, options)
        assert config.model.backbone.frozen_stages == 1
        assert config.param_scheduler[0].end == 10
        assert config.randomness.seed == 3

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            (RETINANET.replace("retinanet_mo", "retinet_mo"), "the nearest next to it: retinanet_mobilemamba"),
            ("/nowhere/config.py", "there is nothing in /nowhere either"),
        ],
    )
    def test_a_missing_configuration(self, path, message):
        with pytest.raises(InputError, match=message):
            load_config(path, {})

    def test_a_broken_configuration(self, tmp_path):
        (tmp_path / "config.py").write_text("_base_ = ['absent.py']\n")
        with pytest.raises(InputError, match=r"cannot be read: .*absent"):
            load_config(str(tmp_path / "config.py"), {})

    def test_a_custom_import_that_fails_shows_why(self, tmp_path, monkeypatch):
        (tmp_path / "my_layers.py").write_text("from torch import no_such_layer\n")
        (tmp_path / "config.py").write_text("custom_imports = dict(imports=['my_layers'])\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(InputError, match=r"cannot be read: Failed to import my_layers: .*no_such_layer") as error:
            load_config(str(tmp_path / "config.py"), {})
        assert "PYTHONPATH" not in str(error.value)


class TestData:
    @pytest.mark.parametrize("config", [RETINANET, SSDLITE])
    def test_the_root_reaches_every_data_set_and_evaluator(self, config, coco):
        check_datasets(load_config(config, {}, data_root=str(coco)), "train", "val", "test")

    def test_the_root_of_ade20k(self, ade20k):
        check_datasets(load_config(SEMANTIC_FPN, {}, data_root=str(ade20k)), "train", "val", "test")

    def test_a_root_that_is_not(self):
        with pytest.raises(InputError, match=r"/nowhere is not a folder: .* downstream.data make ade20k"):
            load_config(SEMANTIC_FPN, {}, data_root="/nowhere")

    @pytest.mark.parametrize("name", ["annotations/instances_val2017.json", "train2017"])
    def test_missing_detection_data(self, coco, capsys, name):
        shutil.move(coco / name, coco / "elsewhere")
        error = said(capsys, training.main, RETINANET, "--data-root", coco)
        assert f"missing: {coco / name} (" in error
        assert "python -m downstream.data check coco" in error

    def test_missing_segmentation_data(self, ade20k, capsys):
        shutil.rmtree(ade20k / "annotations" / "validation")
        error = said(capsys, testing.main, SEMANTIC_FPN, "w.pth", "--data-root", ade20k)
        assert "annotations/validation (test_dataloader.dataset.data_prefix.seg_map_path)" in error

    def test_the_data_is_looked_for_where_the_configuration_says(self, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert "missing: data/coco/train2017" in said(capsys, training.main, MASK_RCNN)

    def test_annotations_of_other_classes(self, coco, capsys):
        path = coco / "annotations" / "instances_train2017.json"
        annotations = json.loads(path.read_text())
        annotations["categories"] = [{"id": 37, "name": "ball"}, {"id": 72, "name": "box"}]
        path.write_text(json.dumps(annotations))
        error = said(capsys, training.main, RETINANET, "--data-root", coco)
        assert f"{path} has 2 categories (ball, box), train_dataloader.dataset expects 80" in error
        assert "num_classes=2" in error

    def test_classes_of_the_users_own(self, coco):
        classes = {
            f"{loader}_dataloader.dataset.metainfo.classes": ("tv", "kite") for loader in ("train", "val", "test")
        }
        check_datasets(load_config(RETINANET, classes, data_root=str(coco)), "train", "val")
        classes["train_dataloader.dataset.metainfo.classes"] = ("tv", "kit")
        with pytest.raises(InputError, match=r"it lacks kit"):
            check_datasets(load_config(RETINANET, classes, data_root=str(coco)), "train")

    @pytest.mark.parametrize("head", ["bbox_head", "mask_head"])
    def test_a_head_of_another_class_count(self, data, tmp_path, capsys, head):
        options = tiny("maskrcnn", size=64) | {f"model.roi_head.{head}.num_classes": 79}
        arguments = (MASK_RCNN, "--data-root", data / "coco", "--work-dir", tmp_path, *arguments_of(options))
        assert f"model.roi_head.{head}.num_classes=80" in said(capsys, training.main, *arguments)

    def test_a_label_out_of_range(self, ade20k):
        for path in (ade20k / "annotations" / "training").iterdir():
            Image.fromarray(np.full((64, 64), 151, np.uint8)).save(path)
        with pytest.raises(InputError, match=r"label 151, expected 0..150"):
            check_datasets(load_config(SEMANTIC_FPN, {}, data_root=str(ade20k)), "train")

    def test_an_evaluator_that_reads_other_annotations(self, data, coco):
        config = load_config(RETINANET, {}, data_root=str(coco))
        config.val_evaluator.ann_file = str(data / "coco" / "annotations" / "instances_val2017.json")
        with pytest.raises(InputError, match="set both to the same, or --data-root"):
            check_datasets(config, "val")
        set_data_root(config, str(data / "coco"))
        check_datasets(config, "val")

    @pytest.mark.parametrize(
        "text", ["", "{}", "<html>", '{"categories": [{"id": 1}]}', '{"categories": [{"id": 1, "na']
    )
    def test_annotations_that_are_none(self, tmp_path, text):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError, match=r"empty|truncated"):
            read_categories(tmp_path / "a.json")

    def test_categories_anywhere_in_the_file(self, tmp_path):
        for text in (
            '{"categories" : [{"name": "a"}], "images": []}',
            '{"images": [], "categories":\n[{"name": "a"}]}\n',
        ):
            (tmp_path / "a.json").write_text(text)
            assert read_categories(tmp_path / "a.json") == [{"name": "a"}]


class TestResuming:
    @pytest.fixture
    def resumed(self, data, tmp_path, monkeypatch):
        """Start a training that resumes in a work folder, and return the checkpoint that it would read."""

        def resume(work_dir):
            runs = []
            monkeypatch.setattr(Runner, "from_cfg", lambda config: runs.append(config.load_from) or Mock())
            arguments = ("--work-dir", work_dir, "--data-root", data / "coco", "--resume")
            assert training.main([RETINANET, *map(str, arguments)]) == 0
            return runs[0]

        return resume

    def test_a_copied_work_folder_resumes_from_itself(self, resumed, tmp_path):
        old, new = tmp_path / "old", tmp_path / "new"
        old.mkdir()
        (old / "epoch_3.pth").write_bytes(b"")
        (old / "last_checkpoint").write_text(str(old / "epoch_3.pth"))
        assert resumed(old) == str(old / "epoch_3.pth")
        shutil.copytree(old, new)
        assert resumed(new) == str(new / "epoch_3.pth")
        assert resumed(tmp_path / "empty") is None

    def test_checkpoints_that_were_kept_elsewhere(self, resumed, data, tmp_path, capsys):
        work_dir, kept = tmp_path / "work", tmp_path / "kept" / "epoch_3.pth"
        work_dir.mkdir()
        kept.parent.mkdir()
        kept.write_bytes(b"")
        (work_dir / "last_checkpoint").write_text(str(kept))
        assert resumed(work_dir) == str(kept)
        kept.unlink()
        arguments = ("--work-dir", work_dir, "--data-root", data / "coco", "--resume")
        assert f"{work_dir} has no epoch_3.pth" in said(capsys, training.main, RETINANET, *arguments)


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"<!DOCTYPE html><title>Quota exceeded</title>", r"a web page \('Quota exceeded'\)"),
            (b"", "is empty"),
            (b"PK\x03\x04 cut off", "is truncated or damaged"),
            (pickle.dumps([1]), "holds a list|no checkpoint"),
            (None, "no checkpoint at"),
        ],
    )
    def test_unreadable_files(self, data, tmp_path, capsys, content, message):
        path = tmp_path / "w.pth"
        if content is not None:
            path.write_bytes(content)
        arguments = (SSDLITE, path, "--data-root", data / "coco", "--work-dir", tmp_path / "work")
        error = said(capsys, testing.main, *arguments, *arguments_of(tiny("ssdlite", size=64)))
        assert error.count("\n") == 1
        assert re.search(message, error)

    def test_a_link_is_refused(self, data, tmp_path, capsys):
        arguments = (SSDLITE, "https://example.org/w.pth", "--data-root", data / "coco", "--work-dir", tmp_path)
        error = said(capsys, testing.main, *arguments, *arguments_of(tiny("ssdlite", size=64)))
        assert "is not on this machine: download it" in error


@pytest.fixture
def two_threads(monkeypatch):
    """PyTorch has two threads, and this process one core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def gloo_threads():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


class TestProcesses:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has synchronised batch norms")
    def test_synchronised_norms_become_plain_without_a_gpu(self, caplog):
        model = {"norm_cfg": {"type": "SyncBN"}, "heads": [{"norm": {"type": "GN"}}], "backbone": {"sync_bn": True}}
        config = Config({"model": model, "env_cfg": {}, "sync_bn": "torch"})
        prepare_processes(config, "none")
        expected = {"norm_cfg": {"type": "BN"}, "heads": [{"norm": {"type": "GN"}}], "backbone": {"sync_bn": False}}
        assert config.model.to_dict() == expected
        assert config.sync_bn is None
        assert config.env_cfg.dist_cfg.backend == "gloo"
        assert [record.message for record in caplog.records] == [
            "no GPU, and synchronised batch norms have no CPU kernel: 2 made plain"
        ]

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="affinity as Linux has it")
    def test_a_runner_has_as_many_threads_as_cores_and_its_log_says_so(self, tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", ONE_CORE, str(tmp_path)],
            cwd=REPOSITORY,
            env={name: value for name, value in os.environ.items() if name not in CHOICES},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "1"
        (log,) = tmp_path.rglob("*.log")
        assert "INFO - 1 thread (1 core by affinity)\n" in log.read_text(encoding="utf-8")

    def test_the_other_tools_have_as_many_threads_as_cores_and_building_a_network_changes_none(self, two_threads):
        inference.build_network(Config({"model": {"type": "BaseDataPreprocessor"}}), device="cpu")
        assert torch.get_num_threads() == 2
        for tool, num_paths in ((get_flops, 1), (inference, 3), (exporting, 3)):
            torch.set_num_threads(2)
            assert tool.main(num_paths * ["missing"]) == 2
            assert torch.get_num_threads() == 1, tool.__name__

    @pytest.mark.skipif(torch.cuda.is_available(), reason="through gloo there is no GPU")
    @pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux for the threads")
    def test_no_thread_of_the_group_is_left_behind(self, monkeypatch, tmp_path):
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
            monkeypatch.setenv(name, str(value))
        prepare_processes(Config({"model": {}}), "pytorch")
        wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        wrapped.runner = [wrapped]  # as mmengine's runner, alive until garbage is collected
        del wrapped
        assert gloo_threads()
        leave_processes()
        assert not gloo_threads()
        leave_processes()

    @pytest.mark.parametrize("is_main", [True, False])
    def test_one_process_writes_the_figures(self, monkeypatch, is_main):
        monkeypatch.setattr("downstream.tools.processes.is_main_process", lambda: is_main)
        logger, timer = LoggerHook(), IterTimerHook()
        hooks = [timer, logger]
        log_once(hooks)
        assert hooks == ([timer, logger] if is_main else [timer])

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs the lack of a GPU")
    def test_mixed_precision_needs_a_gpu(self, data, capsys):
        assert "--amp needs a GPU" in said(capsys, training.main, RETINANET, "--data-root", data / "coco", "--amp")


class TestErrors:
    @pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
    def test_what_this_repository_raises_is_said(self, capsys, kind):
        def body():
            try:
                read_checkpoint("/nowhere/w.pth")
            except OSError as error:
                raise kind(f"class `X`: {error}") from error

        assert exit_code_of(body) == 2
        assert capsys.readouterr().err.startswith("error: class `X`: no checkpoint at /nowhere/w.pth")

    @pytest.mark.parametrize(
        ("body", "kind"),
        [
            (lambda: int("x"), ValueError),
            (lambda: Path("/nowhere").read_text(), FileNotFoundError),
            (lambda: [][1], IndexError),
        ],
    )
    def test_what_others_raise_keeps_its_traceback(self, capsys, body, kind):
        assert exit_code_of(body) == 1
        error = capsys.readouterr().err
        assert error.startswith("Traceback")
        assert f"{kind.__name__}: " in error.splitlines()[-1]


class TestScripts:
    @pytest.mark.parametrize("task", ["det", "seg", "cls"])
    @pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh", "slurm_train.sh", "slurm_test.sh"])
    def test_usage(self, task, script):
        done = run_script(task, script, "config.py")
        assert done.returncode == 2
        assert done.stderr.startswith(f"usage: ./tools/{script} ")

    def test_predictions_of_detectors_go_to_a_file(self, data, capsys):
        error = said(capsys, testing.main, RETINANET, "w.pth", "--data-root", data / "coco", "--out", "folder")
        assert "whose name ends in .pkl or .pickle" in error

    def test_a_number_of_gpus_that_is_none(self):
        done = run_script("det", "dist_train.sh", "config.py", "--resume")
        assert done.returncode == 2
        assert done.stderr.startswith("error: the number of GPUs is '--resume'")

    def test_an_environment_without_openmmlab(self, tmp_path):
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\nexit 1\n")
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        done = run_script("seg", "dist_train.sh", "config.py", "1", env={"PYTHON": str(python)})
        assert done.returncode == 2
        assert "lacks mmengine, mmcv or mmseg: run `make downstream`" in done.stderr

    @pytest.mark.parametrize(
        ("statement", "code", "stderr"),
        [
            ("pass", 0, ""),
            ("exit_code_of(refuse)", 2, "error: not so\n"),
            (
                "rank and os.kill(os.getpid(), 9)",
                137,
                "error: process 1 ended with signal 9; its output is above\n",
            ),
            ("sys.exit(5)", 5, "ended with exit code 5; its output is above\n"),
        ],
    )
    def test_two_processes_end_in_one_message(self, tmp_path, statement, code, stderr):
        script = tmp_path / "a script.py"
        script.write_text(
            "import os, sys, time\n"
            "from downstream.tools.errors import InputError, exit_code_of\n"
            "def refuse():\n    raise InputError('not so')\n"
            "rank = int(os.environ['RANK'])\n"
            f"code = {statement if statement != 'pass' else 'None'}\n"
            "time.sleep(0 if code or rank else 1)\n"
            "sys.exit(code or 0)\n"
        )
        launch = [sys.executable, "-m", "downstream.tools.launch", "--standalone", "--nproc_per_node=2", str(script)]
        done = subprocess.run(
            launch,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code
        assert done.stderr == stderr if code in (0, 2, 137) else done.stderr.endswith(stderr)

    def test_slurm_gets_the_job_it_is_asked_for(self, tmp_path):
        srun = tmp_path / "srun"
        srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GPUS": "16", "SRUN_ARGS": "--quiet -x node1"}
        done = run_script("det", "slurm_train.sh", "part", "name", "my config.py", "work dir", "--amp", env=env)
        script = str(DOWNSTREAM / "det" / "tools" / "train.py")
        options = "--gres=gpu:8 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=5 --kill-on-bad-exit=1 --quiet -x node1"
        assert done.stdout.splitlines() == [
            *("-p", "part", "--job-name=name", *options.split(), sys.executable, "-u", script),
            *("my config.py", "--work-dir", "work dir", "--launcher", "slurm", "--amp"),
        ]
