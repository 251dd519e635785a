"""A folded network as one operator: the bits of its layers, whenever it runs; and when it does not."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import types

import pytest
import torch
from layer_cases import lively
from torch import nn

from model import create_model
from model.mobilemamba import MobileMamba

WHOLE = "mobilemamba_kernels::network"


@functools.cache
def template(seed, settings):
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(seed)
        return lively(create_model(**dict(settings))).fuse()


def folded(seed=0, **settings):
    """A copy of a network that is made once: a seed's weights are always the same."""
    settings = {"name": "MobileMamba_T2", "num_classes": 3} | settings
    return copy.deepcopy(template(seed, tuple(settings.items())))


def layer_by_layer(network, images):
    return network.forward_head(network.forward_features(images))


def operators(network, images):
    """The compiled operators that a call starts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        network(images)
    names = [event.key for event in profiler.key_averages()]
    return {name for name in names if name.startswith("mobilemamba_kernels::")}


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 33, 97), (2, 70, 90), (9, 64, 33)], ids=str)
def test_the_bits_of_its_layers(inference_kernels, restored_threads, shape):
    network = folded()
    images = torch.randn(shape[0], 3, *shape[1:])
    expected = copy.deepcopy(network).double()(images.double())
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answer = network(images)
        assert operators(network, images) == {WHOLE}
        assert answer.is_contiguous()
        assert torch.equal(answer, layer_by_layer(network, images))
        assert torch.equal(answer, network(images))
        assert torch.equal(answer, network(images.contiguous(memory_format=torch.channels_last)))
        assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("settings", [{"name": "MobileMamba_B1"}, {"num_classes": 0}], ids=str)
def test_other_variants(inference_kernels, settings):
    network, images = folded(**settings), torch.randn(1, 3, 64, 96)
    assert operators(network, images) == {WHOLE}
    assert torch.equal(network(images), layer_by_layer(network, images))


def hook_a_stage(network):
    network.blocks2.register_forward_hook(lambda module, inputs, output: 2 * output)


def hook_a_part(network):
    network.blocks2[-1].ffn1.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0], *inputs[1:]))


def hook_the_head(network):
    network.head.register_forward_hook(lambda module, inputs, output: 2 * output)


def give_a_layer_its_own_forward(network):
    before = network.blocks3[-1].forward
    network.blocks3[-1].forward = lambda x: 2 * before(x)


def give_it_its_own_pooling(network):
    pool = MobileMamba.forward_head
    network.forward_head = types.MethodType(lambda self, x: pool(self, 2 * x), network)


def make_it_a_subclass(network):
    class Doubled(MobileMamba):
        def forward_features(self, x):
            return 2 * super().forward_features(x)

    network.__class__ = Doubled


def replace_the_head(network):
    network.head = nn.Linear(368, 3)


def replace_a_layer(network):
    network.blocks1[0] = nn.Sequential(nn.ReLU())


def add_a_layer(network):
    network.blocks3.append(nn.ReLU())


def pool_maxima(network):
    network.global_pool = "max"


@pytest.mark.parametrize(
    "change",
    [
        hook_a_stage,
        hook_a_part,
        hook_the_head,
        give_a_layer_its_own_forward,
        give_it_its_own_pooling,
        make_it_a_subclass,
        replace_the_head,
        replace_a_layer,
        add_a_layer,
        pool_maxima,
    ],
)
def test_layers_run_one_by_one_where_something_is_special(inference_kernels, change):
    """Whatever is done to a network that has run as one operator shows, in its answer too."""
    network, images = folded(), torch.randn(2, 3, 70, 90)
    before = network(images)
    change(network)
    assert WHOLE not in operators(network, images)
    answer = network(images)
    assert torch.equal(answer, layer_by_layer(network, images) if change is not hook_the_head else 2 * before)
    assert not torch.equal(answer, before)


def test_it_is_one_operator_again_after_the_hooks(inference_kernels):
    network, images = folded(), torch.randn(1, 3, 64, 64)
    for register in (network.blocks2.register_forward_hook, torch.nn.modules.module.register_module_forward_hook):
        with register(lambda *_: None):
            assert WHOLE not in operators(network, images)
        assert operators(network, images) == {WHOLE}


def test_not_in_training_nor_with_gradients_nor_under_autocast(compiled_kernels):
    network, images = folded(drop_rate=0.5), torch.randn(2, 3, 64, 64)
    assert operators(network, images) == {WHOLE}
    with torch.autocast("cpu", torch.bfloat16):
        assert WHOLE not in operators(network, images)
    assert WHOLE not in operators(network, images.requires_grad_())
    assert network(images).requires_grad
    with torch.no_grad():
        assert operators(network, images) == {WHOLE}
        assert WHOLE not in operators(network.train(), images)


def test_a_scan_in_four_directions_runs_layer_by_layer(inference_kernels):
    network, images = folded(scan="cross"), torch.randn(1, 3, 64, 64)
    assert WHOLE not in operators(network, images)
    expected = copy.deepcopy(network).double()(images.double())
    assert (network(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


def load_other_weights(network):
    network.load_state_dict(folded(1).state_dict())


def load_other_weights_into_a_layer(network):
    network.blocks2[-1].mixer.proj.load_state_dict(folded(1).blocks2[-1].mixer.proj.state_dict())


def round_a_stage(network):
    network.blocks1.bfloat16().float()


def take_a_layer_of_another(network):
    network.blocks3[-1].ffn0 = folded(1).blocks3[-1].ffn0


@pytest.mark.parametrize(
    "change", [load_other_weights, load_other_weights_into_a_layer, round_a_stage, take_a_layer_of_another]
)
def test_it_follows_the_weights(inference_kernels, change):
    network, images = folded(), torch.randn(2, 3, 64, 64)
    before = network(images)
    change(network)
    answer = network(images)
    assert operators(network, images) == {WHOLE}
    assert torch.equal(answer, layer_by_layer(network, images))
    assert not torch.equal(answer, before)


def saved_and_loaded(network):
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("transfer", [copy.copy, copy.deepcopy, saved_and_loaded], ids=lambda f: f.__name__)
def test_copies_are_networks_of_their_own(inference_kernels, transfer):
    network, images = folded(), torch.randn(2, 3, 64, 64)
    size = len(pickle.dumps(network))
    expected = network(images)
    assert len(pickle.dumps(network)) <= size + 100
    other = transfer(network)
    assert operators(other, images) == {WHOLE}
    assert torch.equal(other(images), expected)
    load_other_weights(other)
    assert not torch.equal(other(images), expected)
    assert torch.equal(network(images), expected) == (transfer is not copy.copy)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        ((1, 3, 31, 64), torch.float32, ValueError, "32 pixels or more"),
        ((1, 4, 64, 64), torch.float32, ValueError, r"\(B, 3, H, W\)"),
        ((3, 64, 64), torch.float32, ValueError, r"\(B, 3, H, W\)"),
        ((1, 3, 64, 64), torch.float64, TypeError, "convert it"),
    ],
    ids=str,
)
def test_bad_images_are_refused_as_ever(inference_kernels, shape, dtype, error, message):
    network = folded()
    network(torch.zeros(1, 3, 64, 64))
    with pytest.raises(error, match=message):
        network(torch.zeros(shape, dtype=dtype))


def test_operator(inference_kernels):
    network, images = folded(), torch.randn(2, 3, 40, 33)
    network(images)
    arguments = network._plan.arguments
    with torch.inference_mode(False), torch.no_grad():
        torch.library.opcheck(
            inference_kernels.network.default, (images, *arguments), test_utils=("test_schema", "test_faketensor")
        )
    for changes, message in [
        ({"weights": arguments.weights[:-3]}, "too few parameters"),
        ({"weights": [*arguments.weights, images]}, "too many parameters"),
        ({"split": arguments.split[1:]}, "too few splits"),
        ({"layers": [3]}, "layers are"),
        ({"stem": [4, 3]}, "4 numbers"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            inference_kernels.network(images, *arguments._replace(**changes))
