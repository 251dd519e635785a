"""What a network asks of a GPU, counted without one; and that what it does there computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from launches import compiled_launches, eager_launches, fake_gpu, images
from layer_cases import feature_map, lively
from torch import nn

from model import create_model
from model.layers import BatchNorm2d, count_batch
from model.lib_mamba import use_backend
from model.mobilemamba.folded_layers import FoldedSS2D
from model.mobilemamba.wavelet import (
    WTEMamba,
    haar_bands,
    haar_filters,
    haar_pixels,
    haar_signs,
    pixels_of_sums,
    sums_of_pixels,
)

SCAN_PARAMETERS = ("dt_projs_weight", "dt_projs_bias", "A_logs", "Ds", "out_norm.weight", "out_norm.bias")


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Let the layers do on a CPU what they do on a GPU, on PyTorch's operators."""
    for module in ("layers", "mobilemamba.wavelet", "mobilemamba.folded_layers", "mobilemamba.mobilemamba"):
        monkeypatch.setattr(f"model.{module}.is_on_gpu", lambda _: True)
    with use_backend("reference"):
        yield


@pytest.fixture
def folded():
    return create_model("MobileMamba_T2").fuse()


def test_launches_of_a_folded_network(folded):
    with fake_gpu(), torch.no_grad():
        network = folded.to("cuda", torch.float16)
        launches = eager_launches(network, images(2, 192))
    assert launches.total() <= 213
    assert launches["scan"] == 5
    # Nothing is cast, no slice is copied but the local branch's, no transform is a convolution.
    assert set(launches) & {"_to_copy", "grouped convolution", "grouped transposed convolution"} == set()
    assert not [name for name in launches if "copy of" in name]
    assert launches["clone"] == 5


def test_autocast_casts_folded_weights_once(folded):
    with fake_gpu(), torch.no_grad(), torch.autocast("cuda"):
        network = folded.to("cuda")
        first, second = (eager_launches(network, images(2, 192, torch.float32)) for _ in range(2))
        assert (first["_to_copy"] > 100, second["_to_copy"]) == (True, 1)  # the one is the images'
        assert not [name for name, value in network.state_dict().items() if value.dtype != torch.float32]
    assert second.total() <= 214


def test_launches_of_a_compiled_network(folded):
    """About ten seconds of inductor."""
    pytest.importorskip("triton")
    with fake_gpu():
        network = folded.to("cuda", torch.float16)
        launches = compiled_launches(network, images(128, 192))
    assert launches.total() <= 154
    assert launches["convolution"] == 35
    assert launches["mobilemamba.gated_scan"] == 5


def test_a_batch_in_training_is_counted_by_one_launch():
    network = create_model("MobileMamba_T2")
    with fake_gpu():
        network.to("cuda", torch.float16).train()
        launches = eager_launches(network, images(2, 64))
    assert launches["_foreach_add_"] == 1
    assert launches["add_"] == 1  # by the head's
    assert not [name for name in launches if "grouped" in name]


def test_a_network_counts_its_batches_once(as_on_gpu):
    network = create_model("MobileMamba_T2", num_classes=3)
    network.blocks2.eval()
    network(torch.randn(2, 3, 64, 64))
    network.set_grad_checkpointing()
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    counts = {name: int(value) for name, value in network.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {name: 0 if name.startswith("blocks2.") else 2 for name in counts}
    alone = BatchNorm2d(2)
    alone(torch.randn(2, 2, 1, 1))
    assert alone.num_batches_tracked == 1
    count_batch([alone, BatchNorm2d(2).eval()])
    assert alone.num_batches_tracked == 2


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 1), (7, 2)], ids=str)
def test_sums_are_twice_the_haar_transform(size):
    filters = haar_filters(5).double()
    signs = haar_signs(filters)
    x = feature_map(2, *size, 5, extra=3).double().requires_grad_()
    bands = haar_bands(x, filters)
    sums = sums_of_pixels(x, signs)
    torch.testing.assert_close(sums, 2 * bands)
    assert sums.is_contiguous(memory_format=torch.channels_last)
    weights = torch.randn_like(bands)
    torch.testing.assert_close(pixels_of_sums(weights, signs, x.shape), 2 * haar_pixels(weights, filters, x.shape))
    torch.testing.assert_close(*(torch.autograd.grad((y * weights).sum(), x)[0] for y in (sums, 2 * bands)))


@pytest.mark.parametrize("kwargs", [{}, {"scan": "cross", "d_state": 2}, {"embed_dim": (200, 376, 448)}], ids=str)
def test_a_folded_network_on_a_gpu_agrees(kwargs, as_on_gpu):
    """In float64, on the widths of the stem that need padding, and on maps of odd sides."""
    torch.manual_seed(0)
    network = lively(create_model("MobileMamba_T2", num_classes=5, **kwargs)).double().eval()
    x = torch.randn(2, 3, 72, 144, dtype=torch.float64)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.mobilemamba.wavelet.is_on_gpu", lambda _: False)
        expected = network(x)
    on_gpu = network(x)
    actual = network.fuse()(x)
    assert [len(getattr(network.patch_embed, f"weight{index}")) % 8 for index in range(3)] == [0, 0, 0]
    for logits in (on_gpu, actual):
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-10)  # with the product's own ReLU


def test_other_filters_are_convolved(as_on_gpu):
    """The sums are only Haar's."""
    layer = WTEMamba(16, 3).double().eval()
    state = layer.state_dict()
    state["wt_filter"] = state["wt_filter"] * 0.5
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    whole = layer(x)
    layer.load_state_dict(state)
    assert not layer.has_haar_filters
    without = layer.base_scale(layer.global_atten(x))
    torch.testing.assert_close(layer(x) - without, 0.5 * (whole - without))


@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half], ids=["bfloat16", "float16"])
def test_parameters_of_a_scan_stay_float32(convert):
    torch.manual_seed(0)
    network = create_model("MobileMamba_T2", num_classes=3).fuse()
    scan = next(layer for layer in network.modules() if isinstance(layer, FoldedSS2D))
    before = {name: scan.get_parameter(name).clone() for name in SCAN_PARAMETERS}
    convert(network)
    after = dict(scan.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name for name, value in after.items() if value.dtype == torch.float32} == set(SCAN_PARAMETERS)
    assert scan.dt_projs_weight.transpose(1, 2).is_contiguous()
    assert scan.double().A_logs.dtype == torch.float64
    with fake_gpu():
        network.to("cuda")
        assert all(scan.get_parameter(key).is_contiguous() for key in SCAN_PARAMETERS)


def test_a_compiled_network_on_a_gpu_is_compiled_once_for_training(as_on_gpu):
    """Without graph breaks, and not again after a test between two epochs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.manual_seed(0)
    network = lively(create_model("MobileMamba_T2", num_classes=3, depth=(1, 0, 0)))
    plain = copy.deepcopy(network)
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    x = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        network.train()
        compiled(x).square().sum().backward()
        plain.train()(x).square().sum().backward()
        network.eval()
    assert len(graphs) == 1
    assert "gated_scan_with_states" in graphs[0].code
    for (name, value), expected in zip(network.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)
    for (name, value), expected in zip(network.named_parameters(), plain.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(value.grad, expected.grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("inductor", "as_on_gpu")
def test_inductor_trains_the_whole_network_as_one_graph():
    torch.manual_seed(0)
    network = lively(create_model("MobileMamba_T2", num_classes=3, depth=(1, 0, 0))).double().train()
    plain = copy.deepcopy(network)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.compile(network, fullgraph=True)(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, value), expected in zip(network.named_parameters(), plain.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(value.grad, expected.grad, rtol=1e-6, atol=1e-6, msg=name)
    for (name, value), expected in zip(network.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)
