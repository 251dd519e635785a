"""The selective scan against a float64 loop over the sequence, for every input and its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.lib_mamba import SS2D, backends, selective_scan, use_backend
from model.lib_mamba.reference import linear_recurrence
from model.mobilemamba.wavelet import WTEMamba

NAMES = ["x", "projection", "dt_weight", "dt_bias", "A_log", "D_skip"]
LENGTHS = [1, 3, 9, 36, 49, 196, 1024]


def loop(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse):
    """The definition, one position after the other, differentiated by autograd."""
    num_directions, channels, rank = dt_weight.shape
    num_states = A_log.shape[1]
    A = -A_log.exp().view(num_directions, channels, num_states)
    total = 0
    for k, (is_reverse, own) in enumerate(zip(reverse, projection.chunk(num_directions, -1), strict=True)):
        dt, B, C = own.split([rank, num_states, num_states], -1)
        delta = F.softplus(torch.einsum("blr,dr->bld", dt, dt_weight[k]) + dt_bias[k])
        state = x.new_zeros(len(x), channels, num_states)
        outputs = [None] * x.shape[1]
        for t in reversed(range(x.shape[1])) if is_reverse else range(x.shape[1]):
            step = delta[:, t, :, None]
            state = (step * A[k]).exp() * state + step * B[:, t, None] * x[:, t, :, None]
            outputs[t] = (state * C[:, t, None]).sum(-1)
        total = total + torch.stack(outputs, 1) + D_skip.view(num_directions, channels)[k] * x
    return total


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Every backend that runs on a CPU; a compiled one is skipped where it is not built."""
    is_available, reason = backends.availability(request.param)
    if not is_available:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


def arguments(length, *, batch=2, channels=5, rank=2, num_states=1, num_directions=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return (
        normal(batch, length, channels),
        normal(batch, length, num_directions * (rank + 2 * num_states)),
        normal(num_directions, channels, rank),
        normal(num_directions, channels),
        normal(num_directions * channels, num_states),
        normal(num_directions * channels),
    )


def output_and_gradients(function, tensors, reverse):
    y = function(*tensors, reverse=reverse)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).cos().view_as(y)
    return y.detach(), torch.autograd.grad((y * weights).sum(), tensors)


@pytest.mark.parametrize("num_states", [1, 3], ids=["N1", "N3"])
@pytest.mark.parametrize("length", LENGTHS)
def test_forward_and_every_gradient_against_float64(length, num_states, backend):
    tensors = arguments(length, num_states=num_states, batch=1 if length == 1024 else 2)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    y, gradients = output_and_gradients(selective_scan, tensors, (False, True))
    expected, expected_gradients = output_and_gradients(loop, exact, (False, True))

    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    for name, actual, wanted in zip(NAMES, gradients, expected_gradients, strict=True):
        assert (actual - wanted).abs().max() <= 2e-5 * wanted.abs().max(), name


@pytest.mark.parametrize("reverse", [(False,), (True,), (True, False), (False, True, True)], ids=str)
def test_any_set_of_directions(reverse, backend):
    tensors = arguments(11, num_directions=len(reverse), num_states=2)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    y, gradients = output_and_gradients(selective_scan, tensors, reverse)
    expected, expected_gradients = output_and_gradients(loop, exact, reverse)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for name, actual, wanted in zip(NAMES, gradients, expected_gradients, strict=True):
        assert (actual - wanted).abs().max() <= 2e-5 * wanted.abs().max(), name


@pytest.mark.parametrize(("length", "num_states"), [(1, 1), (2, 1), (5, 2)])
def test_gradcheck(length, num_states):
    tensors = arguments(length, num_states=num_states, channels=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: selective_scan(*inputs), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    tensors = arguments(6, dtype=dtype)
    op = torch.ops.mobilemamba.selective_scan.default
    torch.library.opcheck(op, (*tensors, [0, 1]))
    flat = tuple(tensor.detach() for tensor in tensors)
    grad = torch.ones_like(flat[0], dtype=torch.float32)
    torch.library.opcheck(torch.ops.mobilemamba.selective_scan_backward.default, (grad, *flat, [0, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_keeps_an_fp32_state_under_autocast(dtype, backend):
    """Long memory: a decay near 1 would round to 1, and a sum of 4,096 small inputs stall, in bf16 or fp16."""
    length, channels = 4096, 3
    x = torch.full((1, length, channels), 0.01, dtype=dtype)
    projection = torch.ones(1, length, 3, dtype=dtype)
    parameters = (
        torch.zeros(1, channels, 1),
        torch.full((1, channels), -9.0),
        torch.zeros(channels, 1),
        torch.zeros(channels),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_scan(x, projection, *parameters, reverse=(False,))
    exact = loop(x.double(), projection.double(), *(p.double() for p in parameters), reverse=(False,))
    assert y.dtype == torch.float32
    # The definition itself, one fp32 addition after the other, is off by 3.6e-5 here; the reference adds in pairs.
    torch.testing.assert_close(y.double(), exact, rtol=1e-5 if backend == "reference" else 4e-5, atol=0)


def test_gradients_come_in_the_inputs_types():
    tensors = arguments(4)
    x = tensors[0].detach().bfloat16().requires_grad_()
    gradients = torch.autograd.grad(selective_scan(x, *tensors[1:]).sum(), (x, *tensors[1:]))
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
    from model.lib_mamba import reference

    watched = {}
    for length in (64, 1024):
        tensors = tuple(tensor.detach() for tensor in arguments(length, channels=16, rank=1, num_states=2))
        with LargestTensor() as watch:
            reference.selective_scan(*tensors, (False, True))
            reference.selective_scan_backward(torch.ones_like(tensors[0]), *tensors, (False, True))
        assert watch.numel <= tensors[0].numel()
        watched[length] = watch.calls
    assert watched[1024] < 2 * watched[64]


def test_bad_shapes_name_the_argument():
    x, projection, *parameters = arguments(4)
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
        y = loop(
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
