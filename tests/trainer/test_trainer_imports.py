"""Packages that a run may lack: each is imported where it is used, and only there."""

from __future__ import annotations

import sys

import pytest
from trainer_cases import CONFIG, TINY_NETWORK, short_run

from data.lmdb_file import LmdbFile, write_lmdb

ABSENT = ("lmdb", "tensorboardX", "matplotlib", "sklearn", "fvcore")


def test_training_needs_neither_lmdb_nor_tensorboardx(launch, class_folders, tmp_path):
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ABSENT:
        (absent / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})\n")
    short = short_run(class_folders, tmp_path / "runs", *TINY_NETWORK, "epoch_full=1")
    done = launch("-c", CONFIG, "-m", "train", *short, env={"PYTHONPATH": str(absent)}, check=0)
    assert done.stdout.count("tensorboardX is not installed (pip install tensorboardX)") == 1
    assert "the log is incomplete" not in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "net.pth").is_file()


def test_lmdb_files_say_what_they_need(tmp_path, monkeypatch):
    write_lmdb(tmp_path / "train.lmdb", [], class_names=[])
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match="need the package lmdb; install it with `pip install lmdb`"):
        LmdbFile(tmp_path / "train.lmdb")
    with pytest.raises(ValueError, match="need the package lmdb"):
        write_lmdb(tmp_path / "val.lmdb", [], class_names=[])
