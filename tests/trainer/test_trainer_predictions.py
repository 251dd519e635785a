"""Files of predictions: whole or unchanged, exact in JSON, and nothing for a spreadsheet to run in CSV."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import resource

import pytest
from PIL import Image

from configs.schema import Predict
from data import Pictures
from trainer.predictions import ClassScore, Prediction, as_text, check_output, write_predictions, write_sheet

HOSTILE = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1", 'a;=1",b\n\x1b[2J', "cat;=1", "\u202etac", "\udcff"]


def predictions_of(names):
    return [
        Prediction(path=f"{name}.png", classes=[ClassScore(0, name, name, 0.75), ClassScore(1, "b", "b", 1e-7)])
        for name in names
    ]


def write(path, predictions):
    write_predictions(path, predictions, model="m", weights="w")


def test_json_holds_every_name_exactly(tmp_path):
    write(tmp_path / "a.json", predictions_of(HOSTILE))
    images = json.loads((tmp_path / "a.json").read_text())["images"]
    assert [image["path"] for image in images] == [f"{name}.png" for name in HOSTILE]
    assert [image["classes"][0]["name"] for image in images] == HOSTILE


def test_no_cell_of_the_csv_file_is_a_formula_and_every_name_can_be_had_back(tmp_path):
    write(tmp_path / "a.csv", predictions_of(HOSTILE))
    with (tmp_path / "a.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))[::2]
    for row, name in zip(rows, HOSTILE, strict=True):
        assert row["name"][0] not in "=+-@\t\r"
        assert row["path"][0] not in "=+-@\t\r"
        assert row["name"].removeprefix("'") == name
        assert row["path"].removeprefix("'") == f"{name}.png"
        assert float(row["probability"]) == 0.75
    # Where the separator is a semicolon, only quotes keep what follows it from being a cell.
    assert '"cat;=1"' in (tmp_path / "a.csv").read_text(encoding="utf-8", errors="surrogateescape")


def test_names_are_one_visible_line_on_screen():
    lines = as_text(predictions_of(HOSTILE)).split("\n")
    assert len(lines) == 3 * len(HOSTILE)
    assert all(line.isprintable() for line in lines)


@contextlib.contextmanager
def small_disk():
    """No file grows beyond 512 bytes, as on a full disk; pytest's own output must not be written meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.png"])
def test_a_full_disk_leaves_the_old_file(tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_bytes(b"old")
    Image.effect_noise((64, 64), 90).save(tmp_path / "in.png")
    pictures = Pictures(str(tmp_path / "in.png"))
    predictions = predictions_of(["long " * 200])
    writer = functools.partial(write_sheet, pictures=pictures, limit=1) if name == "a.png" else write
    with pytest.raises(OSError, match=r"cannot be written \(File too large\)") as caught, small_disk():
        writer(path, predictions)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".webp", ".tiff"])
def test_a_sheet_has_the_format_of_its_name(tmp_path, suffix):
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    path = tmp_path / f"sheet{suffix}"
    check_output(Predict(sheet=str(path)))
    write_sheet(path, predictions_of(["a"]), Pictures(str(tmp_path / "in.png")), limit=1)
    assert Image.registered_extensions()[suffix.lower()] == Image.open(path).format
