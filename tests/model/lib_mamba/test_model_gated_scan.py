"""The gated scan on every backend against a float64 loop: output, gradients, threads, memory."""

from __future__ import annotations

import pytest
import torch
from scan_cases import (
    NAMES,
    TOLERANCES,
    arguments,
    assert_accurate,
    exact,
    exact_of_case,
    gated_scan_loop,
    output_and_gradients,
    relative_errors,
    scan_loop,
)

from model.lib_mamba import SS2D, gated_scan, use_backend

LENGTHS = [1, 3, 9, 16, 36, 49, 64, 144, 196, 256, 576, 1024, 4000]
# Triton's interpreter is slow: it gets short sequences, odd numbers of channels, strided views.
INTERPRETED = pytest.mark.interpreted
INTERPRETED_CASES = {
    torch.float32: (1, 3, 9, 36, 64),
    torch.bfloat16: (1, 16, 144),
    torch.float16: (9, 49),
}


def type_name(dtype):
    return str(dtype).removeprefix("torch.")


def marks(length, dtype):
    slow = [pytest.mark.slow] if length in (576, 4000) else []
    return [*slow, INTERPRETED] if length in INTERPRETED_CASES[dtype] else slow


@pytest.mark.parametrize(
    ("length", "dtype"),
    [
        pytest.param(length, dtype, marks=marks(length, dtype), id=f"{length}-{type_name(dtype)}")
        for length in LENGTHS
        for dtype in TOLERANCES
    ],
)
def test_output_and_every_gradient_against_float64(length, dtype, backend, poisoned_memory):
    batch = 5 if length < 100 else 1
    actual = output_and_gradients(gated_scan, arguments(length, dtype=dtype, batch=batch, device=backend.device))
    assert [tensor.dtype for tensor in actual] == [dtype] * 4 + [torch.float32] * 6
    assert_accurate(actual, exact_of_case(length, dtype, batch), dtype, backend.name)


@pytest.mark.parametrize(
    ("batch", "channels", "rank"),
    [
        pytest.param(1, 1, 1, marks=INTERPRETED),
        pytest.param(1, 16, 17, marks=INTERPRETED),
        (3, 96, 7),
        (1, 224, 2),
        pytest.param(2, 70, 5, marks=INTERPRETED),
    ],
)
def test_any_number_of_channels(batch, channels, rank, backend, poisoned_memory):
    """Full and partly filled vectors, of any width."""
    tensors = arguments(19, batch=batch, channels=channels, rank=rank, device=backend.device)
    if channels == 1:
        tensors[7] = torch.zeros_like(tensors[7])  # the normalised value of a single channel is zero but for rounding
    actual, expected = output_and_gradients(gated_scan, tensors), exact(tensors)
    if channels == 1:
        torch.testing.assert_close(actual[0].double().cpu(), expected[0])
        torch.testing.assert_close(actual[2].double().cpu(), expected[2], rtol=1e-5, atol=1e-6)
    else:
        assert_accurate(actual, expected, torch.float32, backend.name)


@pytest.mark.parametrize("num_states", [1, 3, 16])
@pytest.mark.parametrize("reverse", [(False,), (True,), (True, False), (False, True, True)], ids=str)
def test_any_set_of_directions_and_states(reverse, num_states, backend, poisoned_memory):
    tensors = arguments(21, num_directions=len(reverse), num_states=num_states, device=backend.device)
    actual = output_and_gradients(gated_scan, tensors, reverse=reverse)
    assert_accurate(actual, exact(tensors, reverse=reverse), torch.float32, backend.name)


@INTERPRETED
def test_both_sequences_may_be_views(backend):
    wide = torch.randn(2, 12, 3 * 40, device=backend.device)
    tensors = arguments(12, channels=40, device=backend.device)
    views = [wide[..., :40], wide[..., 80:], *tensors[2:]]
    copies = [tensor.contiguous() for tensor in views]
    for actual, expected in zip(
        output_and_gradients(gated_scan, views), output_and_gradients(gated_scan, copies), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@INTERPRETED
def test_channels_need_not_lie_side_by_side(backend):
    tensors = arguments(12, channels=40, device=backend.device)
    spread = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in tensors]
    for actual, expected in zip(
        output_and_gradients(gated_scan, spread), output_and_gradients(gated_scan, tensors), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("extreme", [-200.0, -20.0, 40.0, pytest.param(300.0, marks=INTERPRETED)])
def test_extreme_time_steps_and_gates(extreme, backend):
    """Time steps that vanish or reset the state at once, gates shut or wide open: exact, and never NaN."""
    tensors = arguments(17, device=backend.device)
    tensors[4] = torch.full_like(tensors[4], extreme)
    tensors[1] = tensors[1] * abs(extreme)
    actual, expected = output_and_gradients(gated_scan, tensors), exact(tensors)
    assert all(tensor.isfinite().all() for tensor in actual)
    errors = relative_errors(actual, [tensor + 1e-30 for tensor in expected])
    del errors["D_skip"]  # a sum of positive and negative parts that may cancel
    assert max(errors["y"], errors["x"], errors["z"]) < 2e-5


def test_long_memory(backend):
    """A decay of nearly 1 over thousands of steps, from small inputs.

    A GPU's exponential is off by some 2 ulp, always to the same side for the same decay: over 4,000 steps, up to 1e-3.
    """
    tensors = arguments(4000, batch=1, channels=16, device=backend.device)
    tensors[4] = torch.full_like(tensors[4], -9.0)
    tensors[3] = tensors[3] * 0.01
    y = gated_scan(*tensors).double().cpu()
    expected = gated_scan_loop(*(tensor.double().cpu() for tensor in tensors))
    tolerance = 1e-3 if backend.device.type == "cuda" else 2e-5
    assert (y - expected).abs().max() < tolerance * y.abs().max()


@pytest.mark.parametrize("channels", [pytest.param(40, marks=INTERPRETED), 384])
def test_sums_beyond_float16(channels, backend):
    """The sum of the directions may exceed the range of x's type: normalised, it is small again."""
    tensors = arguments(36, batch=1, channels=channels, rank=channels // 32, dtype=torch.float16, device=backend.device)
    tensors[0] *= 200
    tensors[2].unflatten(-1, (2, -1))[..., -2:] *= 15
    sums = scan_loop(*(tensor.double() for tensor in (tensors[0], *tensors[2:7])))
    assert sums.abs().max() > 2 * torch.finfo(torch.float16).max
    actual, expected = output_and_gradients(gated_scan, tensors), exact(tensors)
    assert (actual[0].cpu() - expected[0]).abs().max() < 1.2 * TOLERANCES[torch.float16][0] * expected[0].abs().max()
    assert all(tensor.isfinite().all() for tensor in actual)


@pytest.mark.parametrize("place", [pytest.param(0, marks=INTERPRETED), 1, 2], ids=NAMES[:3])
def test_not_a_number_is_passed_on(place, backend):
    """Training stops on NaN only if it sees it."""
    tensors = arguments(9, device=backend.device)
    tensors[place] = tensors[place].clone()
    tensors[place][0, 4, 0] = float("nan")
    y = gated_scan(*tensors)
    assert y[0, 4].isnan().any()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("batch", [1, 3, 5, 66])
def test_gradients_are_the_same_from_run_to_run_and_for_any_number_of_threads(batch, require_backend, restored_threads):
    require_backend("cpu")
    tensors = arguments(70, batch=batch, channels=75)
    with use_backend("cpu"):
        torch.set_num_threads(1)
        first = output_and_gradients(gated_scan, tensors)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = output_and_gradients(gated_scan, tensors)
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True)), threads


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=INTERPRETED),
        pytest.param(torch.bfloat16, marks=INTERPRETED),
        torch.float16,
    ],
    ids=type_name,
)
def test_results_are_the_same_from_run_to_run(dtype, backend):
    tensors = arguments(19, batch=3, dtype=dtype, device=backend.device)
    first, again = (output_and_gradients(gated_scan, tensors) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_an_image_does_not_depend_on_its_batch(backend):
    tensors = arguments(30, batch=4, device=backend.device)
    together = gated_scan(*tensors)
    for index in range(4):
        single = gated_scan(*(tensor[index : index + 1] for tensor in tensors[:3]), *tensors[3:])
        torch.testing.assert_close(single[0], together[index], rtol=0, atol=1e-6)


@INTERPRETED
def test_empty_batch(backend):
    tensors = arguments(5, batch=0, device=backend.device)
    y, *gradients = output_and_gradients(gated_scan, tensors)
    assert y.shape == (0, 5, 37)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, backend):
    tensors = arguments(6, dtype=dtype, device=backend.device)
    inputs = tuple(tensor.clone().requires_grad_() for tensor in tensors)
    torch.library.opcheck(torch.ops.mobilemamba.gated_scan.default, (*inputs, 1e-5, [0, 1]))
    grad = torch.ones_like(tensors[0])
    torch.library.opcheck(torch.ops.mobilemamba.gated_scan_backward.default, (grad, *tensors, 1e-5, [0, 1]))


def test_compiles_without_graph_breaks(backend):
    torch.manual_seed(0)
    module = SS2D(16).to(backend.device)
    x = torch.randn(2, 16, 5, 4, device=backend.device, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(module(x).square().sum(), (x, *module.parameters()))
    actual = torch.autograd.grad(compiled(x).square().sum(), (x, *module.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiles_with_inductor(backend):
    torch.manual_seed(0)
    module = SS2D(16).eval().to(backend.device)
    x = torch.randn(2, 16, 5, 4, device=backend.device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x), rtol=1e-4, atol=1e-5)


def test_autocast_keeps_the_scan_in_float32(backend):
    """Under autocast x, z and the projection are bfloat16; the parameters, the state and the norm are not."""
    torch.manual_seed(0)
    module = SS2D(32).eval().to(backend.device)
    x = torch.randn(2, 32, 6, 5, device=backend.device)
    with torch.no_grad():
        expected = module(x)
        with torch.autocast(backend.device.type, dtype=torch.bfloat16):
            actual = module(x.contiguous(memory_format=torch.channels_last))
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).abs().max() < 2e-2 * expected.abs().max()


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_sequences_of_two_types(types, backend):
    tensors = arguments(9, device=backend.device)
    tensors[0], tensors[1] = tensors[0].to(types[0]), tensors[1].to(types[1])
    actual = output_and_gradients(gated_scan, tensors)
    assert [tensor.dtype for tensor in actual[:3]] == [types[0], *types]
    assert_accurate(actual, exact(tensors), torch.bfloat16, backend.name)


def test_opcheck_of_the_operator_in_training(backend):
    inputs = tuple(tensor.requires_grad_() for tensor in arguments(66, channels=5, device=backend.device))
    torch.library.opcheck(torch.ops.mobilemamba.gated_scan_with_states.default, (*inputs, 1e-5, [0, 1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_unsupported_types_run_on_the_reference(dtype, backend):
    tensors = [tensor.to(dtype) for tensor in arguments(9, device=backend.device)]
    actual = output_and_gradients(gated_scan, tensors)
    assert all(tensor.dtype == dtype for tensor in actual)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-3
    assert max(relative_errors(actual, exact(tensors)).values()) < tolerance


def test_bad_shapes_name_the_argument():
    x, z, *rest = arguments(4)
    with pytest.raises(ValueError, match="z must have the shape"):
        gated_scan(x, z[:, :3], *rest)
    with pytest.raises(ValueError, match="norm_bias must have the shape"):
        gated_scan(x, z, *rest[:-1], rest[-1][:5])
    with pytest.raises(ValueError, match="D_skip must have the shape"):
        gated_scan(x, z, *rest[:4], rest[4][:5], *rest[5:])
