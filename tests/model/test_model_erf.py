"""Effective receptive fields: a convolution's is its kernel, the stem's ends, the last stage's covers the image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from model import create_model
from model.erf import area_shares, main, receptive_field
from model.erf_panel import Panel, draw_panels, save_panels


def images(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 3, size, size, generator=generator) for _ in range(count)]


def test_a_convolutions_field_is_its_kernel():
    """Of two layers that are one: the second kernel spread by the first, at the centre, whatever the images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 5, stride=2, padding=2, bias=False), nn.Conv2d(4, 6, 3, padding=1))
    with torch.no_grad():
        for layer in network:
            layer.weight.abs_()
        network[1].bias.fill_(1e3)  # every feature is positive, so that each counts
    expected = torch.zeros(3, 32, 32)
    for row in range(3):
        for column in range(3):
            kernel = torch.einsum("c,ckij->kij", network[1].weight[:, :, row, column].sum(0), network[0].weight)
            top, left = 2 * (8 + row - 1) - 2, 2 * (8 + column - 1) - 2
            expected[:, top : top + 5, left : left + 5] += kernel
    field = receptive_field(network, images(3, 32))
    assert field.numpy() == pytest.approx(expected.sum(0).double().detach().numpy(), rel=1e-5)


def test_negative_features_and_gradients_do_not_count():
    weights = torch.tensor([[[[1.0, -2.0, 3.0]]], [[[5.0, 5.0, 5.0]]]])
    network = nn.Conv2d(1, 2, (1, 3), padding=(0, 1), bias=True)
    with torch.no_grad():
        network.weight.copy_(weights)
        network.bias.copy_(torch.tensor([100.0, -100.0]))
    field = receptive_field(network, [torch.zeros(1, 1, 3, 7)])
    expected = np.zeros((3, 7))
    expected[1, 2:5] = [1, 0, 3]
    assert np.array_equal(field.numpy(), expected)


def test_shares_are_those_of_squares_around_the_middle():
    field = torch.zeros(9, 12)
    field[2:7, 4:9] = 1.0  # 25 pixels
    assert area_shares(field, (1 / 25, 2 / 25, 9 / 25, 10 / 25, 1.0)) == pytest.approx(
        [1 / 108, 9 / 108, 9 / 108, 25 / 108, 25 / 108]
    )
    corner = torch.zeros(10, 10)
    corner[0, 0] = 1.0
    corner[2, 2] = 0.01
    assert area_shares(corner, (0.5, 1.0)) == pytest.approx([0.01, 0.09])  # squares end where the image does
    with pytest.raises(ValueError, match="no pixel contributes"):
        area_shares(torch.zeros(4, 4))


def test_the_scan_covers_the_whole_input(parity_fill):
    """In float64, so that no gradient is lost. The stem's four convolutions of stride 2 see 31 pixels, no more."""
    network = parity_fill.fill_(create_model("MobileMamba_T2")).double().eval().requires_grad_(False)
    seen = [image.double() for image in images(2, 192)]
    stem = receptive_field(network, seen, stage=0)
    rows, columns = (np.flatnonzero(stem.numpy().any(axis=axis)) for axis in (1, 0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (81, 111, 81, 111)
    last = receptive_field(network, seen, stage=3)
    patches = F.max_pool2d(last[None, None], 8)[0, 0]
    assert (patches > 0).all()
    assert area_shares(last, (0.99,))[0] > area_shares(stem, (0.99,))[0]


def test_the_command(tmp_path, capsys):
    for index, suffix in enumerate(("png", "tif", "gif")):
        pixels = np.random.default_rng(index).integers(0, 255, (50, 90, 3), dtype=np.uint8)
        (tmp_path / "photos" / str(index)).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / str(index) / f"a.{suffix}")
    network = create_model("MobileMamba_T2", num_classes=7)
    torch.save({"net": network.state_dict()}, tmp_path / "seven.pth")
    options = ["--size", "64", "--data", str(tmp_path / "photos"), "--images", "3"]
    written = ["--out", str(tmp_path / "erf.png"), "--json", str(tmp_path / "erf.json")]
    peer = "timm_mobilenetv3_small_050"
    assert main(["MobileMamba_T2", peer, "--checkpoint", str(tmp_path / "seven.pth"), *options, *written]) == 0
    text = capsys.readouterr().out
    entries = json.loads((tmp_path / "erf.json").read_text())
    assert [(entry["network"], entry["images"], entry["size"]) for entry in entries] == [
        ("MobileMamba_T2", 3, 64), (peer, 3, 64)
    ]  # fmt: skip
    for entry in entries:
        shares = list(entry["area"].values())
        assert shares == sorted(shares)
        assert "".join(f"{100 * share:.1f} %".rjust(9) for share in shares) in text
    with Image.open(tmp_path / "erf.png") as file:
        assert file.mode == "P"
        picture = np.asarray(file.convert("RGB"))
    assert (picture[-40:, :].reshape(-1, 3) != 255).any()


def test_a_palette_changes_little(tmp_path):
    contribution = np.random.default_rng(0).random((192, 192)) ** 8
    panels = [Panel(title="field", lines=("a line",), contribution=contribution)]
    sheet = np.asarray(draw_panels(panels)).astype(int)
    for name in ("erf.png", "erf.jpg"):
        save_panels(panels, tmp_path / name)
    with Image.open(tmp_path / "erf.png") as file:
        assert np.abs(np.asarray(file.convert("RGB")) - sheet).mean() < 1
    with Image.open(tmp_path / "erf.jpg") as file:
        assert file.size == sheet.shape[1::-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "there is no folder nowhere; the folder . is empty"),
        (["--stage", "7", "--images", "1"], "of 4 features"),
        (["timm_mobilenetv3_small_050", "--stage", "99", "--images", "1"], "has no stage 99"),
        (["--images", "0"], "--images 0: at least one"),
        (["--out", "erf.txt"], "--out erf.txt: expected a picture's extension"),
        (["MobileMamba_T2=a.pth", "--checkpoint", "b.pth"], "name two files"),
        (["MobileMamba_X"], "no model 'MobileMamba_X'"),
    ],
)
def test_mistakes_are_said_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--size", "64", *arguments] if arguments[0].startswith("--") else [*arguments, "--size", "64"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
