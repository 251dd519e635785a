"""The neck against mmdet's feature pyramid, and its finer levels against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmcv.ops", reason="OpenMMLab is not installed: make downstream")
pytest.importorskip("mmdet.models")

from mmdet.models.necks import FPN

from downstream.det.necks import EfficientViTFPN

CHANNELS = [6, 10, 12]
SIZES = [(21, 32), (11, 16), (6, 8)]


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return [torch.randn(2, channels, *size) for channels, size in zip(CHANNELS, SIZES, strict=True)]


@pytest.mark.parametrize(("num_outs", "coarser"), [(3, False), (5, False), (5, "on_input")])
def test_without_finer_levels_it_is_mmdets_pyramid(inputs, num_outs, coarser):
    neck = EfficientViTFPN(CHANNELS, 8, num_outs, add_extra_convs=coarser)
    pyramid = FPN(CHANNELS, 8, num_outs, add_extra_convs=coarser)
    pyramid.load_state_dict(neck.state_dict())
    assert all(torch.equal(*pair) for pair in zip(neck(inputs), pyramid(inputs), strict=True))


def test_finer_levels_stand_first_finest_first(inputs):
    neck = EfficientViTFPN(CHANNELS, 8, 5, num_extra_trans_convs=2)
    pyramid = EfficientViTFPN(CHANNELS, 8, 3)
    pyramid.load_state_dict(neck.state_dict(), strict=False)
    finest, finer, *outs = neck(inputs)
    assert all(torch.equal(*pair) for pair in zip(outs, pyramid(inputs), strict=True))
    weights = {entry.replace(".conv.", "."): value for entry, value in neck.state_dict().items()}
    lateral = top_down(weights, inputs)
    twice = F.conv_transpose2d(lateral, *conv(weights, "extra_trans_convs.0"), stride=2)
    fourfold = F.conv_transpose2d(twice, *conv(weights, "extra_trans_convs.1"), stride=2)
    torch.testing.assert_close(finer, F.conv2d(twice, *conv(weights, "extra_fpn_convs.1"), padding=1))
    torch.testing.assert_close(finest, F.conv2d(fourfold, *conv(weights, "extra_fpn_convs.0"), padding=1))
    assert finest.shape == (2, 8, 84, 128)


def conv(weights, name):
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def top_down(weights, inputs):
    """The finest lateral, by nearest upsampling and adding."""
    lateral = 0
    for level in (2, 1, 0):
        own = F.conv2d(inputs[level], *conv(weights, f"lateral_convs.{level}"))
        lateral = own + (F.interpolate(lateral, size=own.shape[2:], mode="nearest") if level < 2 else 0)
    return lateral


def test_missing_coarser_levels_are_every_second_pixel_of_the_last(inputs):
    *_, last, coarser, coarsest = EfficientViTFPN(CHANNELS, 8, 6, num_extra_trans_convs=1)(inputs)
    assert torch.equal(coarser, last[..., ::2, ::2])
    assert torch.equal(coarsest, last[..., ::4, ::4])


def test_what_has_no_meaning_is_refused(inputs):
    with pytest.raises(ValueError, match=r"3 inputs and 2 finer levels make more than num_outs=4"):
        EfficientViTFPN(CHANNELS, 8, 4, num_extra_trans_convs=2)
    with pytest.raises(ValueError, match=r"add_extra_convs must be False or 'on_input', got 'on_output'"):
        EfficientViTFPN(CHANNELS, 8, 5, add_extra_convs="on_output")
    with pytest.raises(ValueError, match=r"for 3 maps and got 2"):
        EfficientViTFPN(CHANNELS, 8, 3)(inputs[:2])
