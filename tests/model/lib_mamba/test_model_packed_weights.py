"""Weights in the layouts of the compiled kernels: every number in its place, for any type and device."""

from __future__ import annotations

import pytest
import torch

# Vectors of a matrix's columns, and those of its panels.
PANELS = {1: [1], 2: [2], 3: [3], 4: [2, 2], 5: [3, 2], 6: [3, 3], 7: [3, 2, 2], 9: [3, 3, 3]}
LANES = {"AVX-512": 16, "AVX2": 8, "portable": 4, "NEON": 4}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize(("vectors", "panels"), PANELS.items(), ids=str)
@pytest.mark.parametrize("missing", [0, 3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_lie_in_panels_padded_with_zeros(compiled_kernels, vectors, panels, missing, dtype):
    """A panel has as many columns as this processor multiplies at a time."""
    lanes = LANES[compiled_kernels.cpu_capability()]
    columns = vectors * lanes - missing
    matrix = torch.randn(5, columns).to(dtype)
    packed = compiled_kernels.pack_columns(matrix)
    panels = [panel.view(5, -1) for panel in packed.split([5 * count * lanes for count in panels])]
    assert packed.dtype == dtype
    assert torch.equal(torch.cat(panels, 1)[:, :columns], matrix)
    assert not torch.cat(panels, 1)[:, columns:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "side"), [(1, 1), (1, 3), (5, 1), (6, 5)])
def test_depthwise_weights_have_their_channels_last(compiled_kernels, channels, side, dtype):
    weight = torch.randn(channels, 1, side, side).to(dtype)
    packed = compiled_kernels.pack_depthwise(weight)
    assert packed.shape == (side, side, channels)
    assert packed.is_contiguous()
    assert packed.dtype == dtype
    assert all(torch.equal(packed[..., channel], weight[channel, 0]) for channel in range(channels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "side"), [(1, 1), (1, 3), (5, 1), (6, 5)])
def test_weights_of_bands_lie_band_by_band(compiled_kernels, channels, side, dtype):
    weight = torch.randn(4 * channels, 1, side, side).to(dtype)
    packed = compiled_kernels.pack_bands(weight)
    assert packed.shape == (side, side, 4 * channels)
    assert packed.is_contiguous()
    assert packed.dtype == dtype
    for row in range(4 * channels):
        channel, band = divmod(row, 4)
        assert torch.equal(packed[..., band * channels + channel], weight[row, 0])


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        ("pack_columns", (5, 20)),
        ("pack_columns", (1, 16)),
        ("pack_depthwise", (6, 1, 3, 3)),
        ("pack_depthwise", (1, 1, 1, 1)),
        ("pack_bands", (8, 1, 3, 3)),
        ("pack_bands", (4, 1, 1, 1)),
    ],
    ids=str,
)
def test_packing_is_an_operator_like_any_other(compiled_kernels, operator, shape):
    """Its result is never a view; autograd, tracers and other devices follow it."""
    pack = getattr(compiled_kernels, operator)
    weight = torch.randn(shape, requires_grad=True)
    torch.library.opcheck(pack.default, (weight,))
    packed = pack(weight)
    assert packed.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
    (gradient,) = torch.autograd.grad(packed.square().sum(), weight)
    torch.testing.assert_close(gradient, 2 * weight.detach())
    assert pack(weight.to("meta")).shape == packed.shape


@pytest.mark.parametrize(
    ("operator", "shape", "message"),
    [
        ("pack_columns", (5, 1, 1), "a matrix must be"),
        ("pack_depthwise", (6, 2, 3, 3), "a depthwise weight must be"),
        ("pack_depthwise", (6, 1, 3, 5), "a depthwise weight must be"),
        ("pack_bands", (6, 1, 3, 3), "the weight of bands must be"),
    ],
)
def test_other_shapes_are_refused(compiled_kernels, operator, shape, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(compiled_kernels, operator)(torch.zeros(shape))
