"""Steps of training on the compiled kernels, against float64 in plain PyTorch, and when they run."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from layer_cases import feature_map
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model import create_model
from model.layers import FFN, Residual
from model.lib_mamba import use_backend
from model.lib_mamba.cpu_layers import serve_training
from model.mobilemamba import steps as steps_module
from model.mobilemamba.blocks import Block, DepthwiseFFN, PatchMerging, depthwise, patch_embed
from model.mobilemamba.fuse import fuse
from model.mobilemamba.wavelet import haar_filters, is_haar

STEPS = {"depthwise_ffn", "pointwise", "expand_and_stride", "squeeze_excite", "stem", "mixer"}
# Sides odd and even, a row of pixels, images that do and do not divide among the threads.
MAPS = [(9, 1, 1), (1, 3, 3), (2, 5, 7), (5, 8, 8), (3, 17, 1), (17, 4, 6)]


def with_random_parameters(module):
    """No branch starts at zero, and no two channels are alike."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith(("base_scale.weight", "0.weight")) and parameter.requires_grad:
            nn.init.uniform_(parameter, 0.2, 0.6)
    return module.train()


def block(channels=38, **mixer):
    shares = {"global_ratio": 0.5, "local_ratio": 0.25, "kernel_size": 5} | mixer
    return with_random_parameters(Block(channels, **shares))


def steps_of(tensor):
    """The names of the steps of autograd that a tensor comes from."""
    names, seen, nodes = set(), set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.step if node.name() == "_StepBackward" else node.name())
            nodes += [following for following, _ in node.next_functions]
    return names


def run(module, x):
    """Output, gradients of the input and of the parameters, and buffers after a step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)  # a sum would lead to gradients of zero
    (y * weights.sin()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
    return y, x.grad, gradients, dict(module.named_buffers())


def errors(results, exact):
    """How far output, gradients and buffers are from those in float64, by name and relative to their size."""
    scale = max(gradient.abs().max() for gradient in exact[2].values())
    named = [dict(zip(("y", "dx"), result[:2], strict=True)) | result[2] | result[3] for result in (results, exact)]
    # In front of a batch norm a gradient may be hardly more than rounding.
    sizes = {name: max(value.abs().max().item(), 1e-2 * scale.item()) for name, value in named[1].items()}
    return {
        name: (named[0][name].double() - value).abs().max().item() / sizes[name] for name, value in named[1].items()
    }


def assert_as_in_float64(module, x, *, steps, tolerance=5e-5):
    """Or nearly as close as layer by layer in float32: norms of a few similar pixels magnify rounding."""
    exact = run(copy.deepcopy(module).double(), x.double())
    with use_backend("reference"):
        one_by_one = run(copy.deepcopy(module), x)
    results = run(module, x)
    y = results[0]
    assert steps <= steps_of(y)
    assert not steps & (steps_of(exact[0]) | steps_of(one_by_one[0]))
    assert y.is_contiguous(memory_format=torch.channels_last)
    tolerance = max(tolerance, 3 * max(errors(one_by_one, exact).values()))
    assert {name: error for name, error in errors(results, exact).items() if not error <= tolerance} == {}


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("channels", [5, 48, 75])
def test_depthwise_and_feed_forward(compiled_kernels, shape, channels):
    module = with_random_parameters(DepthwiseFFN(depthwise(channels), Residual(FFN(channels))))
    assert_as_in_float64(module, feature_map(*shape, channels), steps={"depthwise_ffn"})


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 5, 7), (5, 8, 8), (17, 4, 6)], ids=str)
def test_downsampling(compiled_kernels, shape):
    module = with_random_parameters(PatchMerging(9, 21))
    steps = {"expand_and_stride", "squeeze_excite", "pointwise"}
    assert_as_in_float64(module, feature_map(*shape, 9), steps=steps)


@pytest.mark.parametrize("shape", [(2, 33, 47), (3, 64, 32), (5, 32, 40)], ids=str)
@pytest.mark.parametrize("channels", [24, 136])
def test_stem(compiled_kernels, shape, channels):
    module = with_random_parameters(patch_embed(3, channels))
    assert_as_in_float64(module, feature_map(*shape, 3), steps={"stem"})


@pytest.mark.parametrize("shape", [(9, 1, 1), (2, 5, 7), (3, 8, 8), (17, 4, 2)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kernel_size": 3, "local_ratio": 0.5, "channels": 32},  # no identity
        {"kernel_size": 7, "scan": "single"},
        {"d_state": 2, "ssm_ratio": 1.0},
    ],
    ids=str,
)
def test_block(compiled_kernels, shape, settings):
    module = block(**settings)
    steps = {"depthwise_ffn", "mixer"}
    assert_as_in_float64(module, feature_map(*shape, module.dw0.m.c.in_channels), steps=steps, tolerance=2e-4)


WHOLE_NETWORK = """
import copy, torch
from model import create_model
torch.manual_seed(0)
network = create_model("MobileMamba_T2", num_classes=5).train()
for name, parameter in network.named_parameters():
    if parameter.dim() == 1:
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
images = torch.randn(6, 3, 70, 90)
exact = copy.deepcopy(network).double()
logits = {}
for net in (network, exact):
    logits[net] = net(images.to(next(net.parameters()).dtype))
    logits[net].square().sum().backward()
worst = 0.0
for actual, expected in zip(network.parameters(), exact.parameters()):
    if actual.requires_grad and expected.grad.abs().max() > 1e-3:
        worst = max(worst, ((actual.grad - expected.grad).abs().max() / expected.grad.abs().max()).item())
print(worst)
"""


# Pixels, channels before and after: less than a block of each, and more with something left over.
PRODUCTS = """
import torch.nn.functional as F
ops = torch.ops.mobilemamba_kernels
worst = 0.0
for pixels, before, after in ((2, 1, 3), (67, 31, 130), (300, 403, 141), (517, 57, 9)):
    torch.manual_seed(0)
    x, weight = torch.randn(1, before, pixels, 1), torch.randn(after, before, 1, 1)
    grad, scale, shift = torch.randn(1, after, pixels, 1), torch.rand(after) + 0.5, torch.randn(after)
    leaves = [value.double().requires_grad_() for value in (x, weight, scale, shift)]
    y = F.batch_norm(F.conv2d(leaves[0], leaves[1]), None, None, leaves[2], leaves[3], training=True)
    expected = torch.autograd.grad(y, leaves, grad.double())
    results = []
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        running = [torch.zeros(after), torch.ones(after), torch.tensor(0)]
        _, saved = ops.pointwise_step(x, [weight, scale, shift], running, [0.1], [1e-5])
        results.append(ops.pointwise_step_backward(grad, x, saved, [weight, scale, shift]))
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other))
    for actual, value in zip(results[0], expected):
        worst = max(worst, ((actual - value).abs().max() / value.abs().max().clamp(min=1)).item())
print(worst)
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(compiled_kernels, run_with_capability, capability):
    """With sides and channels that do not fill whole vectors; products give the same bits for any number of threads."""
    network, products = map(float, run_with_capability(capability, WHOLE_NETWORK + PRODUCTS).splitlines())
    assert network < 1e-3
    assert products < 2e-5


def test_gradients_are_identical_from_run_to_run(compiled_kernels):
    module, x = block(), feature_map(4, 6, 6, 38)
    first, second = run(copy.deepcopy(module), x), run(copy.deepcopy(module), x)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_gradients_do_not_depend_on_the_threads(compiled_kernels, restored_threads, threads):
    module, x = block(), feature_map(3, 6, 6, 38)
    expected = run(copy.deepcopy(module), x)
    torch.set_num_threads(threads)
    torch.testing.assert_close(run(copy.deepcopy(module), x), expected, rtol=1e-3, atol=1e-4)


def test_what_is_frozen_has_no_gradient_and_the_rest_has_its_own(compiled_kernels):
    module, x = block(), feature_map(2, 6, 6, 38)
    expected = run(copy.deepcopy(module), x)[2]
    module.ffn0.requires_grad_(False)
    actual = run(module, x)[2]
    assert set(actual) == {name for name in expected if not name.startswith("ffn0")}
    torch.testing.assert_close(actual, {name: expected[name] for name in actual}, rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics(compiled_kernels, momentum):
    module = block()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = momentum
    exact = copy.deepcopy(module).double()
    for _ in range(3):
        x = feature_map(2, 4, 4, 38)
        module(x)
        exact(x.double())
    actual, expected = dict(module.named_buffers()), dict(exact.named_buffers())
    assert all(actual[name] == 3 for name in actual if name.endswith("num_batches_tracked"))
    for name, buffer in expected.items():
        torch.testing.assert_close(actual[name].double(), buffer.double(), rtol=1e-4, atol=1e-5)


def test_one_value_a_channel_is_refused_as_by_pytorch(compiled_kernels):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block()(feature_map(1, 1, 1, 38))


def change(block, what):
    module = block.mixer
    if what == "a hook":
        module.m.attn.proj[1].bn.register_forward_hook(lambda *_: None)
    elif what == "a norm in evaluation":
        module.m.attn.local_op.bn1.eval()
    elif what == "a synchronised norm":
        nn.SyncBatchNorm.convert_sync_batchnorm(module.m.attn.proj)
    elif what == "dilation":
        module.m.attn.local_op.dwconv3x3.dilation, module.m.attn.local_op.dwconv3x3.padding = (2, 2), (4, 4)
        block.train()
    elif what == "other filters":
        with torch.no_grad():
            module.m.attn.global_op.wt_filter *= 0.5
    elif what == "learnt filters":
        module.m.attn.global_op.iwt_filter.requires_grad_()
    elif what == "an adapter":
        module.m.attn.proj[1].c = nn.Sequential(module.m.attn.proj[1].c)
    elif what == "half precision":
        block.bfloat16()


@pytest.mark.parametrize(
    "what",
    [
        "a hook",
        "a norm in evaluation",
        "a synchronised norm",
        "dilation",
        "other filters",
        "learnt filters",
        "an adapter",
        "half precision",
    ],
)
def test_what_is_changed_or_watched_runs_layer_by_layer(compiled_kernels, what):
    module, x = block(), feature_map(2, 4, 4, 38)
    assert "mixer" in steps_of(module(x))
    change(module, what)
    y = module(x.bfloat16() if what == "half precision" else x)
    assert not STEPS & steps_of(y)


def test_the_decision_is_made_once_until_something_changes(compiled_kernels, monkeypatch):
    decided = []
    decide = steps_module._decide
    monkeypatch.setattr(steps_module, "_decide", lambda *arguments: decided.append(1) or decide(*arguments))
    module, x = block(), feature_map(2, 4, 4, 38)
    for _ in range(3):
        module(x)
    assert len(decided) == 1
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert STEPS & steps_of(copied(x))
        copied.mixer.m.attn.local_op.bn1.eval()
        assert not STEPS & steps_of(copied(x))
        assert STEPS & steps_of(module(x))
    hook = module.ffn0.m.register_forward_hook(lambda *_: None)
    assert not STEPS & steps_of(module(x))
    hook.remove()
    assert STEPS & steps_of(module(x))
    assert not STEPS & steps_of(module.eval()(x))
    assert STEPS & steps_of(module.train()(x))


@pytest.mark.parametrize("settings", [{"scan": "cross"}, {"global_ratio": 0.0}, {"local_ratio": 0.0}], ids=str)
def test_mixers_of_other_kinds_run_layer_by_layer(compiled_kernels, settings):
    module = block(64, **settings)
    assert "mixer" not in steps_of(module(feature_map(2, 4, 4, 64)))


def test_kernels_run_where_they_serve_and_nowhere_else(compiled_kernels):
    x = feature_map(1, 3, 3, 2)
    assert serve_training(x)
    assert not serve_training(x.double())
    assert not serve_training(x[:0])
    assert not serve_training(x.to("meta"))
    assert not serve_training(nn.Parameter(x))
    assert not serve_training(torch.fx.Proxy(torch.fx.Node(torch.fx.Graph(), "x", "placeholder", "x", (), {})))
    with torch.autocast("cpu", dtype=torch.float16):
        assert not serve_training(x)
    with use_backend("reference"):
        assert not serve_training(x)
    with FlopCounterMode(display=False):
        assert not serve_training(x)
    seen = []

    def watched(value):
        seen.append(serve_training(value))
        return value.sum()

    torch.func.grad(watched)(x)
    assert seen == [False]


@pytest.mark.parametrize("is_slow", [False, True])
def test_bfloat16_autocast_leaves_steps_in_float32_or_to_pytorch(compiled_kernels, pretend_slow_bfloat16, is_slow):
    pretend_slow_bfloat16(is_slow)
    modules = [block(), with_random_parameters(PatchMerging(38, 21)), with_random_parameters(patch_embed(3, 24))]
    for module, width in zip(modules, (38, 38, 3), strict=True):
        x = feature_map(3, 32, 32, width)
        expected = run(copy.deepcopy(module), x)
        steps = STEPS & steps_of(expected[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = run(module, x)
        assert steps
        assert STEPS & steps_of(actual[0]) == (steps if is_slow else set())
        if is_slow:
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_changed_filter_is_used_in_a_folded_network_too(compiled_kernels):
    module = block().eval()
    with torch.no_grad():
        module.mixer.m.attn.global_op.wt_filter *= 0.5
        x = feature_map(2, 6, 6, 38)
        expected = module(x)
        torch.testing.assert_close(fuse(nn.Sequential(module))(x), expected, rtol=1e-3, atol=1e-4)


def test_training_compiles_without_graph_breaks(compiled_kernels):
    network = create_model("MobileMamba_T2", num_classes=3).train()
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(compiled(images), network(images), rtol=1e-3, atol=1e-4)


def test_misshapen_arguments_are_refused(compiled_kernels):
    x, g, vector = feature_map(2, 4, 4, 5), feature_map(2, 4, 4, 7), torch.ones(5)

    def pointwise(weight, *, mean=vector, scale=vector):
        running = [mean, torch.ones(5), torch.tensor(0)]
        return compiled_kernels.pointwise_step(x, [weight, scale, vector], running, [0.1], [1e-5])

    with pytest.raises(RuntimeError, match="running_mean must be 5 floats"):
        pointwise(torch.ones(5, 5, 1, 1), mean=torch.ones(4))
    with pytest.raises(RuntimeError, match="a norm's weight must be 5 floats"):
        pointwise(torch.ones(5, 5, 1, 1), scale=torch.ones(4))
    with pytest.raises(RuntimeError, match=r"weight must be .C', 5, 1, 1."):
        pointwise(torch.ones(5, 4, 1, 1))
    with pytest.raises(RuntimeError, match="2 parameters instead of 3"):
        compiled_kernels.pointwise_step(x, [vector, vector], [vector, vector, torch.tensor(0)], [0.1], [1e-5])
    with pytest.raises(RuntimeError, match="1 running tensors, 1 momenta and 0 eps for 1 norms"):
        compiled_kernels.pointwise_step(x, [torch.ones(5, 5, 1, 1), vector, vector], [vector], [0.1], [])
    _, saved = pointwise(torch.ones(5, 5, 1, 1))
    with pytest.raises(RuntimeError, match="grad must be"):
        compiled_kernels.pointwise_step_backward(g, x, saved, [torch.ones(5, 5, 1, 1), vector, vector])
    with pytest.raises(RuntimeError, match="1 saved tensors instead of 2"):
        compiled_kernels.pointwise_step_backward(x, x, saved[:1], [torch.ones(5, 5, 1, 1), vector, vector])


def test_schemas(compiled_kernels):
    running = [torch.zeros(7), torch.ones(7), torch.tensor(0)]
    parameters = [torch.randn(7, 5, 1, 1), torch.ones(7), torch.zeros(7)]
    x = feature_map(2, 3, 4, 5)
    forward = (x, parameters, running, [0.1], [1e-5])
    torch.library.opcheck(compiled_kernels.pointwise_step.default, forward, test_utils="test_schema")
    y, saved = compiled_kernels.pointwise_step(*forward)
    backward = (torch.randn_like(y), x, saved, parameters)
    torch.library.opcheck(compiled_kernels.pointwise_step_backward.default, backward, test_utils="test_schema")


@pytest.mark.parametrize("band", [1, 9])
def test_the_filters_are_recognised(band):
    filters = haar_filters(7).contiguous(memory_format=torch.channels_last)
    assert is_haar(filters)
    assert is_haar(filters * (0.70710677**2 / 0.5))  # as the released checkpoints have them
    filters[band, 0, 1, 0] += 1e-3
    assert not is_haar(filters)
