"""The selective scan on every backend against a float64 loop, for every input and its gradient; the scans of SS2D."""

from __future__ import annotations

import pytest
import torch
from scan_cases import exact, output_and_gradients, relative_errors, scan_arguments, scan_loop
from torch.utils._python_dispatch import TorchDispatchMode

from model.lib_mamba import SS2D, reference, selective_scan
from model.lib_mamba.reference import linear_recurrence
from model.mobilemamba.wavelet import WTEMamba

NAMES = ["x", "projection", "dt_weight", "dt_bias", "A_log", "D_skip"]
LENGTHS = [1, 3, 9, 36, 49, 196, 1024]
SIZES = {"channels": 5, "rank": 2}


def assert_gradients_accurate(actual, expected):
    errors = relative_errors(actual, expected, NAMES)
    del errors["y"]
    assert {name: error for name, error in errors.items() if not error <= 2e-5} == {}


@pytest.mark.parametrize("num_states", [1, 3], ids=["N1", "N3"])
@pytest.mark.parametrize("length", LENGTHS)
def test_forward_and_every_gradient_against_float64(length, num_states, backend):
    batch = 1 if length == 1024 else 2
    tensors = scan_arguments(length, **SIZES, num_states=num_states, batch=batch, device=backend.device)
    actual, expected = output_and_gradients(selective_scan, tensors), exact(tensors, scan_loop)
    assert relative_errors(actual, expected, NAMES)["y"] <= 1e-5
    assert_gradients_accurate(actual, expected)


@pytest.mark.parametrize("reverse", [(False,), (True,), (True, False), (False, True, True)], ids=str)
def test_any_set_of_directions(reverse, backend):
    tensors = scan_arguments(11, **SIZES, num_directions=len(reverse), num_states=2, device=backend.device)
    actual = output_and_gradients(selective_scan, tensors, reverse=reverse)
    expected = exact(tensors, scan_loop, reverse=reverse)
    torch.testing.assert_close(actual[0].double().cpu(), expected[0], rtol=1e-5, atol=1e-5)
    assert_gradients_accurate(actual, expected)


@pytest.mark.parametrize(("length", "num_states"), [(1, 1), (2, 1), (5, 2)])
def test_gradcheck(length, num_states):
    tensors = scan_arguments(length, num_states=num_states, channels=3, rank=2)
    assert torch.autograd.gradcheck(selective_scan, [tensor.double().requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    tensors = [tensor.to(dtype) for tensor in scan_arguments(6, **SIZES)]
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    torch.library.opcheck(torch.ops.mobilemamba.selective_scan.default, (*inputs, [0, 1]))
    grad = torch.ones_like(tensors[0], dtype=torch.float32)
    torch.library.opcheck(torch.ops.mobilemamba.selective_scan_backward.default, (grad, *tensors, [0, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_keeps_an_fp32_state_under_autocast(dtype, backend):
    """Long memory: a decay near 1 would round to 1, and a sum of 4,096 small inputs stall, in bf16 or fp16."""
    length, channels = 4096, 3
    tensors = [
        torch.full((1, length, channels), 0.01, dtype=dtype),
        torch.ones(1, length, 3, dtype=dtype),
        torch.zeros(1, channels, 1),
        torch.full((1, channels), -9.0),
        torch.zeros(channels, 1),
        torch.zeros(channels),
    ]
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        y = selective_scan(*(tensor.to(backend.device) for tensor in tensors), reverse=(False,))
    expected = scan_loop(*(tensor.double() for tensor in tensors), reverse=(False,))
    assert y.dtype == torch.float32
    # The definition itself, one fp32 addition after the other, is off by 3.6e-5 here; the reference adds in pairs.
    tolerance = 1e-5 if backend.name == "reference" else 4e-5
    torch.testing.assert_close(y.double().cpu(), expected, rtol=tolerance, atol=0)


def test_gradients_come_in_the_inputs_types():
    x, *others = scan_arguments(4, **SIZES)
    _, *gradients = output_and_gradients(selective_scan, [x.bfloat16(), *others])
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] + [torch.float32] * 5


def test_strong_decay_does_not_underflow():
    """Products of decays over 512 steps are far below the smallest float; the states are not."""
    decay = torch.full((1, 512, 2), 1e-3)
    inputs = torch.randn(1, 512, 2)
    for is_reverse in (False, True):
        states = linear_recurrence(decay, inputs, is_reverse=is_reverse)
        assert states.isfinite().all()
        last = states[:, 0] - 1e-3 * states[:, 1] if is_reverse else states[:, -1] - 1e-3 * states[:, -2]
        torch.testing.assert_close(last, inputs[:, 0 if is_reverse else -1])


class LargestTensor(TorchDispatchMode):
    """Watches every operator: how many there are, and the largest result."""

    def __init__(self):
        super().__init__()
        self.calls, self.numel = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_loop_over_the_length_and_no_tensor_of_all_directions_and_states():
    watched = {}
    for length in (64, 1024):
        tensors = scan_arguments(length, channels=16, rank=1, num_states=2)
        with LargestTensor() as watch:
            reference.selective_scan(*tensors, (False, True))
            reference.selective_scan_backward(torch.ones_like(tensors[0]), *tensors, (False, True))
        assert watch.numel <= tensors[0].numel()
        watched[length] = watch.calls
    assert watched[1024] < 2 * watched[64]


def test_bad_shapes_name_the_argument():
    x, projection, *parameters = scan_arguments(4, **SIZES)
    with pytest.raises(ValueError, match="projection must have the shape"):
        selective_scan(x, projection[..., :-1], *parameters)
    with pytest.raises(ValueError, match="reverse must have the shape"):
        selective_scan(x, projection, *parameters, reverse=(False,))
    with pytest.raises(ValueError, match="L >= 1"):
        selective_scan(x[:, :0], projection[:, :0], *parameters)
    with pytest.raises(ValueError, match="scan must be one of"):
        SS2D(16, scan="diagonal")


@pytest.mark.parametrize("num_states", [1, 2])
def test_cross_scan_is_rows_and_columns_both_ways(num_states):
    """Against four single scans of the map as it is, transposed, and both turned round."""
    torch.manual_seed(0)
    module = SS2D(16, scan="cross", d_state=num_states).double()
    torch.nn.init.normal_(module.A_logs)
    torch.nn.init.normal_(module.Ds)
    x = torch.randn(2, 3, 5, 32, dtype=torch.float64)
    rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
    expected = torch.zeros_like(x)
    for k, sequence in enumerate([rows, columns, rows.flip(1), columns.flip(1)]):
        own = slice(k * 32, (k + 1) * 32)
        y = scan_loop(
            sequence,
            sequence @ module.x_proj_weight[k].T,
            module.dt_projs_weight[k : k + 1],
            module.dt_projs_bias[k : k + 1],
            module.A_logs[own],
            module.Ds[own],
            reverse=(False,),
        )
        y = y.flip(1) if k >= 2 else y
        expected += y.view(2, 3, 5, 32) if k % 2 == 0 else y.view(2, 5, 3, 32).transpose(1, 2)
    torch.testing.assert_close(module.scan_pixels(x), expected)


@pytest.mark.parametrize("scan", ["single", "bidirectional", "cross"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 4)])
def test_scans_of_any_map_reach_every_parameter(scan, height, width):
    torch.manual_seed(0)
    module = WTEMamba(16, 3, scan=scan)
    x = torch.randn(3, 16, height, width, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    missing = [
        name for name, parameter in module.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert missing == []
