"""When the compiled layers of the CPU run, and the contracts of their operators."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from model import create_model
from model.lib_mamba import cpu_layers, layouts, use_backend
from model.lib_mamba.cpu_layers import serve


def test_kernels_run_where_they_serve_and_nowhere_else(inference_kernels):
    x = torch.zeros(1, 2, 3, 3)
    assert serve(x) is not None
    assert serve(x.half()) is None
    assert serve(x.to("meta")) is None
    with torch.autocast("cpu", dtype=torch.float16):
        assert serve(x) is None
    with torch.inference_mode(False), torch.enable_grad():
        assert serve(torch.zeros(1, 2, 3, 3, requires_grad=True)) is None
        assert serve(torch.zeros(1, 2, 3, 3)) is not None
    with use_backend("reference"):
        assert serve(x) is None


def pretend_amx(monkeypatch, is_there):
    """Make this an x86 processor with AMX, or without, and cache nothing of it."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: is_there)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    uncached = cpu_layers._lacks_matrix_unit.__wrapped__
    monkeypatch.setattr(cpu_layers, "_lacks_matrix_unit", uncached)


@pytest.mark.parametrize("is_slow", [False, True])
def test_bfloat16_is_left_to_processors_that_are_fast_at_it(inference_kernels, monkeypatch, is_slow):
    pretend_amx(monkeypatch, not is_slow)
    x = torch.zeros(1, 2, 3, 3)
    assert (serve(x.bfloat16()) is not None) == is_slow
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (serve(x) is not None) == (serve(x.bfloat16()) is not None) == is_slow
    assert serve(x) is not None


def test_nothing_is_said_of_kernels_that_are_not_chosen(inference_kernels, monkeypatch, caplog):
    caplog.set_level("INFO")
    pretend_amx(monkeypatch, False)
    x = torch.zeros(1, 2, 3, 3).bfloat16()
    with use_backend("reference"):
        assert serve(x) is None
        assert "compiled layers" not in caplog.text
    assert serve(x) is not None
    assert "compiled layers compute in float32" in caplog.text


class Matrix(NamedTuple):
    """A product's weight, which is packed once the library is there."""

    depth: int
    columns: int


def packed(value):
    if isinstance(value, Matrix):
        return layouts.columns(torch.zeros(value))
    return [packed(item) for item in value] if isinstance(value, (list, tuple)) else value


def check(operator, *arguments):
    torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("pointwise", (torch.randn(2, 5, 3, 4), Matrix(5, 7), torch.randn(7), torch.randn(2, 7, 3, 4), 1)),
        (
            "ffn",
            (
                torch.randn(2, 5, 3, 4),
                torch.randn(3, 3, 5),
                torch.randn(5),
                Matrix(5, 10),
                torch.randn(10),
                Matrix(10, 5),
                torch.randn(5),
            ),
        ),
        ("convs", (torch.randn(2, 3, 9, 8), [Matrix(27, 4)], [torch.randn(4)], 3, 2, 1)),
        ("depthwise", (torch.randn(2, 5, 4, 4), torch.randn(3, 3, 5), torch.randn(5), None, None, 2, 1, 2)),
        ("wavelet", (torch.randn(2, 5, 4, 3), torch.randn(3, 3, 20), torch.randn(2, 5, 4, 3))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_opcheck(inference_kernels, operator, arguments):
    with torch.inference_mode(False), torch.no_grad():
        check(getattr(inference_kernels, operator), *packed(arguments))


def test_misshapen_arguments_are_refused(inference_kernels):
    x = torch.randn(1, 5, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"weight, in panels, must be \d+ floats"):
        inference_kernels.pointwise(x, torch.zeros(5 * 7), torch.zeros(7), None, 0)
    with pytest.raises(RuntimeError, match="weight must be"):
        inference_kernels.depthwise(x, torch.zeros(3, 3, 4), torch.zeros(5), None, None, 1, 1, 0)
    with pytest.raises(RuntimeError, match="base must be"):
        inference_kernels.wavelet(x, torch.zeros(3, 3, 20), F.pad(x, (0, 1)))


def test_opcheck_of_groups(inference_kernels):
    network = create_model("MobileMamba_T2", num_classes=3).fuse()
    block, merging = network.blocks2[-1], network.blocks2[1]
    with torch.inference_mode(False), torch.no_grad():
        weights = [*block.ffn0.kernel_weights(), *block.mixer.kernel_weights(), *block.ffn1.kernel_weights()]
        check(inference_kernels.block, torch.randn(2, 272, 3, 4), weights, *block.mixer.kernel_settings())
        widen, depthwise, excite, narrow = merging
        weights = [*widen.kernel_weights, *depthwise.kernel_weights, *excite.kernel_weights(), *narrow.kernel_weights]
        check(inference_kernels.patch_merging, torch.randn(2, 144, 5, 4), weights)
