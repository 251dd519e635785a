"""The commands that users type, in their own processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

from trainer_cases import CONFIG, REPOSITORY, TINY_NETWORK, epoch_records, free_port, short_run

import trainer
from configs import load_config
from util.distributed import Process

ONE_EPOCH = ("epoch_full=1", "warmup_epochs=0")


def counts(text: str) -> dict[str, tuple[str, str]]:
    return {name: found for name, *found in re.findall(r"Test (\w+): top-1 .*?\((\d+/\d+)\).*?\((\d+/\d+)\)", text)}


def run_folder(runs):
    (folder,) = runs.iterdir()
    return folder


def test_the_published_commands_on_two_ranks_and_on_one(launch, class_folders, tmp_path):
    runs = tmp_path / "runs"
    short = short_run(class_folders, runs, *ONE_EPOCH)
    done = launch("-c", CONFIG, "-m", "train", *short, num_processes=2, check=0)
    assert "2 process(es), backend gloo" in done.stdout
    assert "[rank 1]" not in done.stdout
    folder = run_folder(runs)
    weights = f"model.model_kwargs.checkpoint_path={folder / 'latest_ckpt.pth'}"
    tested = launch("-c", CONFIG, "-m", "test", *short, weights, num_processes=2, check=0)
    found = counts(tested.stdout)
    assert sorted(found) == ["net", "net_E"]
    assert all(top5.endswith("/15") for _, top5 in found.values())
    assert found == counts(done.stdout)
    alone = trainer.Tester(load_config(CONFIG, [*short, weights], mode="test"), Process())
    assert alone.run() == 0
    assert {name: f"{score.top1_count}/{score.num_images}" for name, score in alone.scores.items()} == {
        name: top1 for name, (top1, _) in found.items()
    }


def test_the_distilled_recipe_with_its_teacher_on_two_ranks(launch, class_folders, tmp_path):
    teacher = ("loss.loss_terms.1.cfg.model_kwargs.checkpoint_path=", "loss.loss_terms.1.size=64")
    short = short_run(class_folders, tmp_path / "runs", *ONE_EPOCH, *teacher)
    done = launch("-c", f"{CONFIG}s", "-m", "train", *short, num_processes=2, launcher="torch.distributed.run", check=0)
    assert re.search(r"Train: .*\[CE .*\] \[KD .*\]", done.stdout)
    assert epoch_records(run_folder(tmp_path / "runs"))[0]["train"]["KD"] > 0


def test_a_typo_is_one_line(launch):
    done = launch("-c", CONFIG, "-m", "train", "optim.lrr=1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: optim.lrr")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_bad_data_is_one_line_on_two_ranks(launch, class_folders, tmp_path):
    short = short_run(class_folders, tmp_path / "runs", *TINY_NETWORK, "nb_classes=5")
    done = launch("-c", CONFIG, "-m", "train", *short, num_processes=2, launcher="torch.distributed.run")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "nb_classes" in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert "3 classes" in errors[0]


def test_slurm_variables(class_folders, tmp_path):
    short = short_run(class_folders, tmp_path / "runs", *TINY_NETWORK, *ONE_EPOCH)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "run.py", "-c", CONFIG, "-m", "train", *short],
            cwd=REPOSITORY,
            env=environment | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "2 process(es)" in outputs[0]
    assert "files in" in outputs[0]
    assert outputs[1] == ""


def start_training(class_folders, tmp_path):
    """Start a long run, and return its process when it trains; SIGHUP is not ignored in it, whoever started us."""
    short = short_run(class_folders, tmp_path / "runs", *TINY_NETWORK, "epoch_full=1000")
    run = subprocess.Popen(
        [sys.executable, "run.py", "-c", CONFIG, "-m", "train", *short],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    for line in run.stdout:
        if "Epoch 1:" in line:
            break
    return run


def test_sigterm_saves_and_exits_with_143(class_folders, tmp_path):
    run = start_training(class_folders, tmp_path)
    run.send_signal(signal.SIGTERM)
    output = run.communicate(timeout=60)[0]
    assert run.returncode == 143, output
    folder = run_folder(tmp_path / "runs")
    assert f"stopped by SIGTERM; the state is saved, resume with trainer.resume_dir={folder}" in output
    assert (folder / "latest_ckpt.pth").is_file()


def test_sighup_saves_and_exits_with_129(class_folders, tmp_path):
    run = start_training(class_folders, tmp_path)
    run.stdout.close()
    run.send_signal(signal.SIGHUP)
    assert run.wait(timeout=60) == 129
    assert "stopped by SIGHUP; the state is saved" in (run_folder(tmp_path / "runs") / "log.txt").read_text()


def test_help_needs_nothing(launch):
    done = launch("--help", check=0, env={"CUDA_VISIBLE_DEVICES": ""})
    for word in (
        "--config",
        "{train,ft,test,test_net,predict}",
        "--logger_rank",
        "--dist_url",
        "--sleep",
        "path.key=value",
    ):
        assert word in done.stdout
