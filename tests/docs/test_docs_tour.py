"""The blocks of docs/tour.md run as they stand, in their order, in a copy of the repository."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from doc_blocks import ROOT, Block, blocks_of, play
from PIL import Image

PACKAGES = ("configs", "data", "downstream", "loss", "model", "optim", "trainer", "util", "weights")
NOT_COPIED = ("*.pth", "__pycache__", "imagenet", "digits", "build")


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository, in a folder with a space in its name."""
    root = tmp_path / "a clone"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for name in ("run.py", "hubconf.py"):
        shutil.copy(ROOT / name, root)
    return root


def play_all(root: Path, blocks: list[Block]) -> str:
    """Run blocks one after the other; Python ones that follow each other share a process, to save imports."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    joined: list[Block] = []
    for block in blocks:
        if joined and block.language == joined[-1].language == "python":
            joined[-1] = joined[-1]._replace(code=f"{joined[-1].code}\n{block.code}")
        else:
            joined.append(block)
    return "".join(play(root, block, environment, timeout=900) for block in joined)


def test_every_block_says_how_it_is_run():
    blocks = blocks_of("tour.md")
    assert {block.language for block in blocks} == {"python", "bash"}
    assert {block.mark for block in blocks} == {"", "slow", "internet"}
    assert sum(block.mark == "internet" for block in blocks) <= 3


def test_the_quick_blocks(clone):
    output = play_all(clone, [block for block in blocks_of("tour.md") if not block.mark])
    assert "MobileMamba_B4" in output
    predicted = json.loads((clone / "tour" / "predictions.json").read_text())["images"]
    assert [image["path"] for image in predicted] == ["tour/cmyk.jpg", "tour/grey.png"]
    assert Image.open(clone / "tour" / "sheet.png").width > 400


@pytest.mark.slow
def test_the_whole_tour(clone):
    output = play_all(clone, [block for block in blocks_of("tour.md") if block.mark != "internet"])
    assert "frozen: backbone" in output
    assert "2 classes, called by the checkpoint's own names" in output
    with (clone / "tour" / "digits.csv").open(newline="") as file:
        first = [row for row in csv.DictReader(file) if row["rank"] == "1"]
    right = sum(Path(row["path"]).parent.name == row["name"] for row in first)
    assert len(first) == 360
    assert right > 0.8 * len(first)  # even and odd digits come as often: by chance it would be half


def test_the_guides_name_entries_that_exist():
    from configs import load_config

    text = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    table = [row for row in text.splitlines() if row.startswith("| ")][1:]
    overrides = [re.findall(r"`([^`]+=[^`]+)`", row.split("|")[2]) for row in table]
    assert sum(map(len, overrides)) > 8
    for choices in overrides:
        for choice in choices:
            load_config("configs/mobilemamba/finetune", choice.split(), mode="ft")
