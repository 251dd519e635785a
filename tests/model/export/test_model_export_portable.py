"""The portable form: the recurrence against a loop, the network against itself in float64."""

from __future__ import annotations

import pytest
import torch

from model.export import Form, portable
from model.export.scan import any_recurrence, doubling_recurrence, exact_recurrence


def loop(decay, inputs, is_reverse):
    shape = inputs.shape
    decay, inputs = decay.flatten(1, 2), inputs.flatten(1, 2)
    order = range(inputs.shape[1])
    states, state = torch.empty_like(inputs), torch.zeros_like(inputs[:, 0])
    for position in reversed(order) if is_reverse else order:
        state = decay[:, position] * state + inputs[:, position]
        states[:, position] = state
    return states.view(shape)


@pytest.mark.parametrize("is_reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 6), (5, 1), (3, 4), (7, 9)])
def test_recurrence_agrees_with_a_loop(height, width, is_reverse):
    torch.manual_seed(0)
    decay, inputs = torch.rand(2, 2, height, width, 3, dtype=torch.float64)
    decay[0, -1, -1] = 0  # a state that is forgotten
    expected = loop(decay, inputs, is_reverse)
    exact = exact_recurrence(decay, inputs, (height, width), is_reverse=is_reverse)
    torch.testing.assert_close(exact, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(any_recurrence(decay, inputs, is_reverse=is_reverse), exact)
    doubled = doubling_recurrence(decay, inputs, (4, 5), is_reverse=is_reverse)  # enough for 16 by 32 pixels
    torch.testing.assert_close(doubled, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"distillation": True, "in_chans": 1},
        {"scan": "cross", "d_state": 2},
        {"scan": "single", "global_pool": "max"},
        {"num_classes": 0},
        {"global_ratio": (0, 0.7, 0.6), "local_ratio": (0.5, 0, 0.3)},
    ],
    ids=["released", "two-heads-grey", "cross", "single-max", "no-head", "empty-branches"],
)
@pytest.mark.parametrize(
    "form",
    [Form(), Form(is_joined=False), Form(is_flat=True, is_grouped=False)],
    ids=["joined", "apart", "flat"],
)
def test_portable_network_is_the_same_function(small, relative_error, kwargs, form):
    network = small(**kwargs).double()
    images = torch.randn(2, network.in_chans, 97, 130, dtype=torch.float64)
    names = set(network.state_dict())
    with torch.no_grad():
        expected = network(images)
        exact = portable(network, form, (97, 130))(images)
        any_size = portable(network, form, None)(images)
    assert relative_error(exact, expected) < 1e-12
    assert relative_error(any_size, expected) < 1e-12
    assert set(network.state_dict()) == names  # the network itself is not folded
