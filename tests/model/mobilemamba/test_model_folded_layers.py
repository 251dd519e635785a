"""The layers of a folded network on the compiled kernels, against float64 in plain PyTorch."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from layer_cases import feature_map, lively
from torch import nn
from torch.autograd.profiler import profile

from model import create_model
from model.layers import Residual
from model.lib_mamba import layouts
from model.mobilemamba.folded_layers import (
    Activation,
    FoldedConvs,
    FoldedDepthwise,
    FoldedFFN,
    FoldedPointwise,
    FoldedSqueezeExcite,
    average,
)
from model.mobilemamba.fuse import fuse
from model.mobilemamba.mixer import MRFFI, Mixer
from model.mobilemamba.wavelet import haar_bands, haar_filters, haar_pixels

TOLERANCE = 2e-6
# A map of one pixel, odd sides, images that do and do not divide among the threads.
MAPS = [(1, 1, 1), (4, 1, 1), (1, 3, 3), (2, 5, 7), (5, 8, 8), (1, 12, 12), (3, 17, 1)]


def test_a_map_of_one_pixel_in_either_layout(inference_kernels):
    layer = FoldedPointwise(nn.Conv2d(5, 3, 1))
    x = torch.randn(4, 5, 1, 1)
    assert_close(layer(x), exactly(layer, x))
    assert_close(layer(x.contiguous(memory_format=torch.channels_last)), exactly(layer, x))


def assert_close(actual, expected):
    assert actual.dtype == torch.float32
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert (actual.double() - expected).abs().max() <= TOLERANCE * expected.abs().max()


def exactly(module, *inputs):
    """The output of a module in float64, for which there are no kernels."""
    return copy.deepcopy(module).double()(*(x.double() for x in inputs))


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize(("channels", "out"), [(5, 3), (37, 16), (64, 49), (72, 130), (9, 66), (8, 96)])
@pytest.mark.parametrize("activation", Activation)
def test_pointwise(inference_kernels, shape, channels, out, activation):
    layer = FoldedPointwise(nn.Conv2d(channels, out, 1), activation)
    x, residual = feature_map(*shape, channels, extra=4), feature_map(*shape, out, extra=1)
    assert_close(layer(x), exactly(layer, x))
    assert_close(layer(x, residual), exactly(layer, x, residual))


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("channels", [5, 48, 75])
@pytest.mark.parametrize("has_depthwise", [False, True])
def test_ffn(inference_kernels, shape, channels, has_depthwise):
    depthwise = FoldedDepthwise(nn.Conv2d(channels, channels, 3, padding=1, groups=channels)) if has_depthwise else None
    widen = FoldedPointwise(nn.Conv2d(channels, 2 * channels, 1), Activation.RELU)
    layer = FoldedFFN(depthwise, widen, FoldedPointwise(nn.Conv2d(2 * channels, channels, 1)))
    x, residual = feature_map(*shape, channels, extra=3), feature_map(*shape, channels, extra=1)
    assert_close(layer(x), exactly(layer, x))
    assert_close(layer(x, residual), exactly(layer, x, residual))


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize(("channels", "hidden"), [(5, 2), (48, 12), (134, 33)])
def test_squeeze_excite(inference_kernels, shape, channels, hidden):
    reduce = FoldedPointwise(nn.Conv2d(channels, hidden, 1), Activation.RELU)
    layer = FoldedSqueezeExcite(reduce, FoldedPointwise(nn.Conv2d(hidden, channels, 1)))
    x = feature_map(*shape, channels, extra=3)
    assert_close(layer(x), exactly(layer, x))


@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_average(inference_kernels, shape):
    x = feature_map(*shape, 37, extra=3)
    torch.testing.assert_close(average(x).double(), x.double().mean((2, 3)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [*MAPS, (2, 20, 23)], ids=str)
@pytest.mark.parametrize(
    ("ratios", "scan"),
    [((0.8, 0.2), "bidirectional"), ((0.6, 0.3), "bidirectional"), ((0.5, 0.0), "single"), ((0.5, 0.2), "cross")],
    ids=str,
)
def test_mixer(inference_kernels, shape, ratios, scan):
    """With and without a local branch and channels that pass; one operator, but for a scan in several orders."""
    mixer = MRFFI(45, global_ratio=ratios[0], local_ratio=ratios[1], kernel_size=5, scan=scan)
    mixer = lively(nn.ModuleList([Residual(Mixer(mixer))])).eval()
    x = feature_map(*shape, 45, extra=3)
    expected = exactly(mixer[0], x)
    layer = fuse(mixer)[0]
    assert bool(layer.global_op.global_atten.reverse) == (scan != "cross")
    assert_close(layer(x), expected)


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 33, 47), (8, 40, 35), (3, 1, 2)], ids=str)
def test_convs(inference_kernels, shape):
    widths = [3, 9, 18, 40]
    convs = [nn.Conv2d(narrow, wide, 3, 2, 1) for narrow, wide in pairwise(widths)]
    layer = FoldedConvs(convs)
    x = torch.randn(shape[0], 3, *shape[1:])
    assert_close(layer(x), exactly(layer, x))
    for same in (x.contiguous(memory_format=torch.channels_last), torch.stack([x, -x], -1)[..., 0]):
        assert torch.equal(layer(same), layer(x))


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("channels", [5, 16, 75, 134])
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (5, 1), (7, 1)])
def test_depthwise(inference_kernels, shape, channels, side, stride):
    conv = nn.Conv2d(channels, channels, side, stride, side // 2, groups=channels)
    x = feature_map(*shape, channels, extra=2)
    for activation in Activation:
        layer = FoldedDepthwise(conv, activation)
        assert_close(layer(x), exactly(layer, x))
    layer = FoldedDepthwise(conv, Activation.RELU, affine=nn.Conv2d(channels, channels, 1, groups=channels))
    assert_close(layer(x), exactly(layer, x))


@pytest.mark.parametrize("shape", [*MAPS, (1, 32, 50)], ids=str)
@pytest.mark.parametrize(("channels", "side"), [(5, 3), (32, 5), (37, 7)])
def test_wavelet(inference_kernels, shape, channels, side):
    bands = nn.Conv2d(4 * channels, 4 * channels, side, padding="same", groups=4 * channels, bias=False)
    x, base = feature_map(*shape, channels, extra=2), feature_map(*shape, channels)
    filters = haar_filters(channels).double()
    convolved = copy.deepcopy(bands).double()(haar_bands(x.double(), filters))
    expected = base.double() + haar_pixels(convolved, filters, x.shape)
    assert_close(inference_kernels.wavelet(x, layouts.bands(bands.weight), base), expected)


WHOLE_NETWORK = """
import copy, torch
from torch import nn
from model import create_model
torch.manual_seed(0)
network = create_model("MobileMamba_T2", num_classes=5).eval()
for module in network.modules():
    if isinstance(module, nn.BatchNorm2d):
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.uniform_(module.running_var, 0.5, 1.5)
images = torch.randn(2, 3, 70, 90)
with torch.inference_mode():
    expected = copy.deepcopy(network).double()(images.double())
    actual = network.fuse()(images)
print(((actual - expected).abs().max() / expected.abs().max()).item())
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(inference_kernels, run_with_capability, capability):
    """With sides and channels that do not fill whole vectors."""
    assert float(run_with_capability(capability, WHOLE_NETWORK)) < 1e-5


def test_empty_batch(inference_kernels):
    network = create_model("MobileMamba_T2", num_classes=3).fuse()
    assert network(torch.zeros(0, 3, 64, 64)).shape == (0, 3)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_results_do_not_depend_on_the_threads(inference_kernels, restored_threads, threads):
    network = create_model("MobileMamba_T2", num_classes=3).fuse()
    images = torch.randn(3, 3, 64, 96)
    expected = network(images)
    torch.set_num_threads(threads)
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def slow_in_bfloat16(inference_kernels, pretend_slow_bfloat16):
    pretend_slow_bfloat16(True)


def folded_layers(channels):
    """One of each kind, for maps of these channels."""
    conv, affine = (nn.Conv2d(channels, channels, side, padding=side // 2, groups=channels) for side in (3, 1))
    depthwise = FoldedDepthwise(conv, Activation.RELU, affine=affine)
    widen = FoldedPointwise(nn.Conv2d(channels, 2 * channels, 1), Activation.RELU)
    ffn = FoldedFFN(FoldedDepthwise(conv), widen, FoldedPointwise(nn.Conv2d(2 * channels, channels, 1)))
    convs = FoldedConvs([nn.Conv2d(channels, 8, 3, 2, 1), nn.Conv2d(8, 24, 3, 2, 1)])
    return [widen, depthwise, ffn, convs]


@pytest.mark.usefixtures("slow_in_bfloat16")
def test_layers_in_bfloat16_round_only_their_result():
    for layer in folded_layers(21):
        x = feature_map(3, 9, 8, 21).bfloat16()
        actual, expected = layer.bfloat16()(x), exactly(layer, x)
        assert actual.dtype == torch.bfloat16
        rounding = 2**-8 * expected.abs()
        assert ((actual.double() - expected).abs() <= rounding + TOLERANCE * expected.abs().max()).all()


@pytest.mark.usefixtures("slow_in_bfloat16")
def test_features_under_autocast_are_those_in_float32():
    network = create_model("MobileMamba_T2", num_classes=3).fuse()
    images = torch.randn(2, 3, 64, 96)
    expected = network.forward_features(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = network.forward_features(images)
        assert torch.is_autocast_enabled("cpu")
        assert network(images).dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@pytest.mark.usefixtures("slow_in_bfloat16")
@pytest.mark.parametrize("what", ["autocast", "bfloat16"])
def test_bfloat16_compiles_without_graph_breaks(what):
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, what == "autocast"):
        dtype = torch.float32 if what == "autocast" else torch.bfloat16
        network = create_model("MobileMamba_T2", num_classes=3).fuse().to(dtype)
        images = torch.randn(2, 3, 64, 64, dtype=dtype)
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), network(images))


def test_gradients_of_the_image_flow_through_a_folded_network(inference_kernels):
    with torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        network = create_model("MobileMamba_T2", num_classes=3).eval()
        images = torch.randn(1, 3, 64, 64, requires_grad=True)
        (expected,) = torch.autograd.grad(network(images).square().sum(), images)
        (actual,) = torch.autograd.grad(network.fuse()(images).square().sum(), images)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_compiles_without_graph_breaks_onto_the_same_kernels(inference_kernels):
    with torch.inference_mode(False), torch.no_grad():
        network = create_model("MobileMamba_T2", num_classes=3).fuse()
        images = torch.randn(2, 3, 64, 64)
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), network(images))
        with profile() as calls:
            compiled(images)
    names = [event.name for event in calls.function_events]
    assert names.count("mobilemamba_kernels::block") == 5
    assert not [name for name in names if name in ("aten::convolution", "aten::addmm")]


def test_what_is_laid_out_for_another_processor_is_not_read(inference_kernels):
    """A pickled network has the layouts of the processor that it was pickled on."""
    layer = FoldedPointwise(nn.Conv2d(5, 40, 1))
    x = feature_map(2, 3, 3, 5)
    expected = layer(x)
    layer.panels.fill_(torch.nan)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)


@pytest.mark.parametrize("shape", [*MAPS, (16, 3, 3), (9, 5, 4)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_groups_as_one_operator(inference_kernels, restored_threads, shape, threads):
    """A block and a downsampling, a few images at a time or layer by layer, are what their parts are."""
    torch.set_num_threads(threads)
    network = lively(create_model("MobileMamba_T2", num_classes=3)).fuse()
    merging, _, block = network.blocks2[1:4]
    x, y = feature_map(*shape, 144, extra=3), feature_map(*shape, 272, extra=3)
    for group, argument in ((merging, x), (block, y)):
        expected = exactly(group, argument)
        whole = group(argument)
        assert_close(whole, expected)
        assert torch.equal(whole, group(argument))
        next(group.children()).register_forward_hook(lambda *_: None)
        assert_close(group(argument), expected)


def test_what_watches_the_parts_of_a_group_sees_them(inference_kernels):
    network = create_model("MobileMamba_T2", num_classes=3).fuse()
    seen = []
    network.blocks1[0].mixer.register_forward_hook(lambda module, *_: seen.append(module))
    network.blocks2[1][3].register_forward_pre_hook(lambda module, *_: seen.append(module))
    network(torch.zeros(1, 3, 64, 64))
    assert seen == [network.blocks1[0].mixer, network.blocks2[1][3]]


def test_saved_and_loaded_folded_network_agrees(inference_kernels):
    torch.manual_seed(1)
    network = create_model("MobileMamba_T2", num_classes=3).fuse()
    other = create_model("MobileMamba_T2", num_classes=3).fuse()
    other.load_state_dict(network.state_dict())
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(other(images), network(images), rtol=0, atol=0)


def test_weights_for_the_kernels_follow_and_are_no_second_state(inference_kernels):
    """After loading, casting there and back, and copying; the state dict holds only weights."""
    torch.manual_seed(2)
    network, other = (create_model("MobileMamba_T2", num_classes=3).fuse() for _ in range(2))
    images = torch.randn(2, 3, 64, 64)
    other.load_state_dict(network.state_dict())
    for copied in (other, copy.deepcopy(network), network.double().float()):
        expected = copy.deepcopy(copied).double()(images.double())
        assert (copied(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    state = network.state_dict()
    unfolded = create_model("MobileMamba_T2", num_classes=3).state_dict()
    assert sum(value.numel() for value in state.values()) < sum(value.numel() for value in unfolded.values())
    assert set(network.to("meta").patch_embed.panels) == {None}
