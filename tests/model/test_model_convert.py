"""Weights between layouts: bit for bit there and back, nothing overwritten, omissions reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from model import create_model
from model.convert import convert, main

ROOT = Path(__file__).resolve().parents[2]
FILES = {"release": "weights.pth", "safetensors": "weights.safetensors", "openmmlab": "openmmlab.pth"}


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    values = create_model("MobileMamba_T2", num_classes=3).state_dict()
    values["head.l.bias"] = torch.tensor([float("nan"), -0.0, float("inf")])  # bits that a comparison would not see
    return values


@pytest.fixture
def release(tmp_path, weights):
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "release.pth"
    torch.save(weights, path)
    return path


def bits(weights):
    return {name: (value.dtype, tuple(value.shape), value.numpy().tobytes()) for name, value in weights.items()}


@pytest.mark.parametrize("last", FILES)
@pytest.mark.parametrize("middle", FILES)
def test_there_and_back_is_bit_equal(release, weights, tmp_path, middle, last):
    between, end, back = tmp_path / f"1{FILES[middle]}", tmp_path / f"2{FILES[last]}", tmp_path / "back.pth"
    convert(release, between, layout=middle)
    convert(between, end, layout=last)
    done = convert(end, back, layout="release")
    assert bits(torch.load(back, weights_only=True)) == bits(weights)
    assert (done.num_entries, done.num_head, done.without_head, done.num_outside) == (len(weights), 7, False, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"source", between.name, end.name, back.name}


def test_layouts_are_what_others_read(release, weights, tmp_path):
    for layout, name in FILES.items():
        convert(release, tmp_path / name, layout=layout)
    detector = torch.load(tmp_path / FILES["openmmlab"], weights_only=True)
    assert set(detector["state_dict"]) == {f"backbone.{name}" for name in weights}
    assert bits(safetensors.torch.load_file(tmp_path / FILES["safetensors"])) == bits(weights)
    assert list(torch.load(tmp_path / FILES["release"], weights_only=True)) == list(weights)


@pytest.mark.parametrize("layout", FILES)
def test_every_layout_loads_as_a_checkpoint(release, weights, tmp_path, layout):
    convert(release, tmp_path / FILES[layout], layout=layout)
    network = create_model("MobileMamba_T2", num_classes=3, checkpoint_path=tmp_path / FILES[layout])
    assert bits(network.state_dict()) == bits(weights)


def test_layout_of_lightning_is_read(tmp_path, weights):
    torch.save({"state_dict": {f"model.{name}": value for name, value in weights.items()}}, tmp_path / "last.ckpt")
    convert(tmp_path / "last.ckpt", tmp_path / "A.SafeTensors", layout="safetensors")
    assert bits(safetensors.torch.load_file(tmp_path / "A.SafeTensors")) == bits(weights)


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_folded_weights_are_refused(tmp_path, capsys, layout, prefix):
    folded = create_model("MobileMamba_T2", num_classes=3).fuse().state_dict()
    entries = {f"{prefix}{name}": value for name, value in folded.items()} | {"decode_head.bias": torch.ones(2)}
    torch.save({"state_dict": entries}, tmp_path / "folded.pth")
    assert main([str(tmp_path / "folded.pth"), str(tmp_path / FILES[layout]), "--to", layout]) == 2
    assert "folded.pth holds a folded network" in capsys.readouterr().err
    assert not (tmp_path / FILES[layout]).exists()


@pytest.mark.parametrize("ema", [False, True])
def test_either_weights_of_a_training_run(tmp_path, weights, ema):
    averaged = {name: value + 1 for name, value in weights.items()}
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"net": wrapped, "net_E": averaged, "iter": 5}, tmp_path / "run.pth")
    done = convert(tmp_path / "run.pth", tmp_path / "a.safetensors", layout="safetensors", ema=ema)
    assert done.source == ("net_E" if ema else "net")
    assert bits(safetensors.torch.load_file(tmp_path / "a.safetensors")) == bits(averaged if ema else weights)


def test_head_and_detector_are_left_out_and_said_so(tmp_path, weights, capsys):
    entries = {f"backbone.{name}": value for name, value in weights.items()} | {"neck.conv.weight": torch.ones(2)}
    torch.save({"state_dict": entries, "meta": {"epoch": 12}}, tmp_path / "detector.pth")
    code = main([str(tmp_path / "detector.pth"), str(tmp_path / "a.pth"), "--to", "release", "--no-head"])
    said = capsys.readouterr().out
    assert code == 0
    assert "none of a head; left out: the head and 1 entries outside the backbone" in said
    kept = torch.load(tmp_path / "a.pth", weights_only=True)
    assert set(kept) == {name for name in weights if not name.startswith("head.")}


def test_views_are_saved_without_what_they_are_part_of(tmp_path):
    whole = torch.zeros(1000, 1000)
    torch.save({"patch_embed.0.c.weight": whole[:2, :2], "other": whole.t()[:2]}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.pth", layout="release")
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors", layout="safetensors")
    assert (tmp_path / "b.pth").stat().st_size < 20_000
    assert (tmp_path / "b.safetensors").stat().st_size < 20_000


def test_nothing_is_overwritten_unasked(release, tmp_path, capsys):
    target = tmp_path / "a.pth"
    target.write_text("mine")
    assert main([str(release), str(target), "--to", "release"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert main([str(release), str(target), "--to", "release", "--overwrite"]) == 0
    assert len(torch.load(target, weights_only=True)) == len(torch.load(release, weights_only=True))


def test_a_failed_write_leaves_nothing(release, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        convert(release, tmp_path / "a.pth", layout="release")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("target", "layout", "reason"),
    [
        ("a.pth", "safetensors", r"a\.pth: .* has to end in \.safetensors"),
        ("a.safetensors", "openmmlab", r"has to not end in \.safetensors"),
        ("a.pth", "onnx", "known: release, safetensors, openmmlab"),
        ("nowhere/a.pth", "release", "no folder .*nowhere"),
    ],
)
def test_unusable_target_is_refused(release, tmp_path, target, layout, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        convert(release, tmp_path / target, layout=layout)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth holds no weights of MobileMamba \(conv1\.weight"):
        convert(tmp_path / "a.pth", tmp_path / "b.pth", layout="release")


def test_command(release, tmp_path):
    target = tmp_path / "a.safetensors"
    command = [sys.executable, "-m", "model.convert", release, target, "--to", "safetensors"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "RuntimeWarning" not in result.stderr
    assert result.stdout.endswith("entries of bare as safetensors, 7 of the head among them\n")
    assert target.is_file()
