"""The whole network: sizes, features, folding, initialisation, export, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_cases import lively
from torch import nn

from model import create_model, list_models, variant_shapes
from model.mobilemamba.mixer import split_channels
from model.mobilemamba.wavelet import haar_filters


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_model("mobilemamba_t2", num_classes=7)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (64, 1030), (97, 65), (160, 224)])
def test_any_size_from_32_gives_stages_rounded_up(network, height, width):
    network.eval()
    with torch.no_grad():
        maps = network.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
    expected = [(channels, stride) for channels, stride in ((144, 16), (144, 16), (272, 32), (368, 64))]
    assert [tuple(x.shape) for x in maps] == [(1, c, -(-height // s), -(-width // s)) for c, s in expected]


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 1, 64, 64), (3, 64, 64)])
def test_unusable_input_is_refused(network, shape):
    with pytest.raises(ValueError, match=r"input must be \(B, 3, H, W\)"):
        network(torch.zeros(shape))


def test_empty_batch_gives_empty_logits(network):
    with torch.no_grad():
        assert network.eval()(torch.zeros(0, 3, 64, 64)).shape == (0, 7)


def test_feature_indices(network):
    images = torch.randn(2, 3, 64, 64)
    network.eval()
    with torch.no_grad():
        last, (first, final) = network.forward_intermediates(images, indices=[0, -1])
        only = network.forward_intermediates(images, indices=[1], intermediates_only=True)
    assert torch.equal(last, final)
    assert first.shape == (2, 144, 4, 4)
    assert len(only) == 1
    assert [info["num_chs"] for info in network.feature_info] == [144, 144, 272, 368]


@pytest.mark.parametrize("kwargs", [{}, {"distillation": True}, {"scan": "cross", "d_state": 2}, {"num_classes": 0}])
def test_fused_network_agrees(kwargs):
    torch.manual_seed(1)
    network = lively(create_model("MobileMamba_T2", **{"num_classes": 11, **kwargs})).eval()
    for name, parameter in network.named_parameters():
        if "_scale" in name:
            nn.init.uniform_(parameter.data, 0.5, 1.5)
    images = torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        expected = network(images)
        fused = network.fuse()
        actual = fused(images)
        again = fused.fuse()(images)
    assert fused is network
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(actual, again)
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in network.modules())


def test_fuse_keeps_the_dtype():
    network = create_model("MobileMamba_T2", num_classes=3).to(torch.bfloat16).fuse()
    others = {name for name, parameter in network.named_parameters() if parameter.dtype != torch.bfloat16}
    # But for what the scan would cast at every call.
    assert {name.rpartition("global_atten.")[2] for name in others} == {
        *("dt_projs_weight", "dt_projs_bias", "A_logs", "Ds", "out_norm.weight", "out_norm.bias")
    }
    with torch.no_grad():
        assert network(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)).isfinite().all()


def test_gradient_checkpointing_changes_neither_gradients_nor_statistics():
    torch.manual_seed(0)
    plain = lively(create_model("mobilemamba_t2", num_classes=5, drop_path=0.0)).train()
    frugal = copy.deepcopy(plain)
    frugal.set_grad_checkpointing()
    images = torch.randn(3, 3, 64, 96)
    for network in (plain, frugal):
        network(images).square().mean().backward()
    for (name, expected), actual in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(actual.grad, expected.grad, msg=name)
    for (name, expected), actual in zip(plain.named_buffers(), frugal.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=name)


def test_distillation_returns_both_heads_in_training_and_their_mean_in_evaluation():
    torch.manual_seed(0)
    network = create_model("MobileMamba_T2", num_classes=5, distillation=True)
    images = torch.randn(4, 3, 64, 64)
    logits, logits_dist = network(images)
    assert logits.shape == logits_dist.shape == (4, 5)
    network.eval()
    with torch.no_grad():
        features = network.forward_head(network.forward_features(images), pre_logits=True)
        expected = (network.head(features) + network.head_dist(features)) / 2
        assert torch.equal(network(images), expected)


def test_initialisation():
    network = create_model("MobileMamba_T2")
    state = network.state_dict()
    block = "blocks1.0."
    scan = block + "mixer.m.attn.global_op.global_atten."
    for silent in ("dw0.m.bn", "ffn0.m.pw2.bn", "mixer.m.attn.proj.1.bn", "dw1.m.bn", "ffn1.m.pw2.bn"):
        assert state[f"{block}{silent}.weight"].count_nonzero() == 0
    for awake in ("ffn0.m.pw1.bn", "mixer.m.attn.local_op.bn1", "mixer.m.attn.global_op.global_atten.out_proj.bn"):
        assert (state[f"{block}{awake}.weight"] == 1).all()
    assert (state[scan + "Ds"] == 1).all()
    assert (state[scan + "A_logs"] == 0).all()
    for name in ("dt_projs_weight", "dt_projs_bias"):
        assert 0 <= state[scan + name].min() < 0.01
        assert 0.09 < state[scan + name].max() < 0.1
    bound = 224**-0.5
    assert 0.98 * bound < state[scan + "x_proj_weight"].abs().max() <= bound
    assert (state[block + "mixer.m.attn.global_op.wavelet_scale.0.weight"] == 0.1).all()
    assert (state[block + "mixer.m.attn.global_op.base_scale.weight"] == 1).all()
    assert state["head.l.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["head.l.bias"].count_nonzero() == 0


def test_a_fresh_network_starts_with_silent_branches():
    """With zero BN weights, a block doubles its input: its own residual and five that add nothing."""
    network = create_model("MobileMamba_T2").eval()
    x = torch.randn(1, 144, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(network.blocks1[0](x), 2 * x)


def test_drop_path_rises_linearly():
    network = create_model("MobileMamba_B1", drop_path=0.6)
    rates = [module.drop_prob for name, module in network.named_modules() if name.endswith("drop_path")]
    assert rates == pytest.approx([0.1 * index for index in range(7)])


@pytest.mark.parametrize(
    ("channels", "ratios", "expected"),
    [
        (144, (0.8, 0.2), (112, 28, 4)),
        (120, (0.8, 0.2), (96, 24, 0)),
        (50, (0.8, 0.3), (48, 2, 0)),  # 40 lies between 32 and 48: up; the local share is cut
        (64, (0.0, 0.5), (0, 32, 32)),
    ],
)
def test_channel_split(channels, ratios, expected):
    assert split_channels(channels, *ratios) == expected


def test_haar_transform_is_orthogonal():
    filters = haar_filters(1).flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(4))
    assert filters.tolist()[1] == [0.5, 0.5, -0.5, -0.5]


def test_variant_shapes_allocate_nothing_and_agree():
    shapes = variant_shapes(num_classes=7)
    assert shapes["MobileMamba_T2"] == {
        k: v.shape for k, v in create_model("MobileMamba_T2", num_classes=7).state_dict().items()
    }


def test_variants_are_listed_in_the_order_of_their_size():
    assert list_models() == [f"MobileMamba_{name}" for name in ("T2", "T4", "S6", "B1", "B2", "B4")]


def test_compiled_and_exported_networks_agree():
    torch.manual_seed(0)
    network = lively(create_model("MobileMamba_T2", num_classes=5)).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = network(images)
        graph = torch.compile(network, backend="aot_eager", fullgraph=True)(images)
        program = torch.export.export(
            network, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
        ).module()
        exported = program(images)
        single = program(images[:1])
    torch.testing.assert_close(graph, expected)
    torch.testing.assert_close(exported, expected)
    torch.testing.assert_close(single, expected[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scan", ["bidirectional", "cross"])
def test_onnx_is_given_no_operators_of_ours(scan, monkeypatch):
    torch.manual_seed(0)
    network = lively(create_model("MobileMamba_T2", num_classes=5, depth=(1, 0, 0), scan=scan)).eval()
    images = torch.randn(2, 3, 80, 64)
    with torch.no_grad():
        expected = network(images)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(network, (images,))
    assert not [node for node in program.graph.nodes if "mobilemamba" in str(node.target)]
    torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_exported_to_onnx_for_any_batch(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = lively(create_model("MobileMamba_T2", num_classes=5)).fuse()
    images = torch.randn(2, 3, 64, 64)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(network, (images,), dynamo=True, dynamic_shapes=({0: batch},))
    program.save(tmp_path / "network.onnx")
    session = runtime.InferenceSession(tmp_path / "network.onnx")
    images = torch.randn(5, 3, 64, 64)
    (actual,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(actual), network(images), rtol=1e-4, atol=1e-4)


def test_compiled_training_gradients_agree():
    torch.manual_seed(0)
    # Batch norms over a few values magnify rounding: float64 shows what is the same.
    network = lively(create_model("MobileMamba_T2", num_classes=5)).double()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    network(images).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad}
    network.zero_grad()
    torch.compile(network, backend="aot_eager", fullgraph=True)(images).square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max() + 1e-6, name
