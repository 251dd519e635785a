"""The CUDA kernels compiled as C++ (cuda_as_cpp.py): orders of threads, sizes of devices, the released networks' calls.

The tests of every backend run on them too, under `backend` in conftest.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cuda_as_cpp import FEW, H200_SHARED, MANY, SMALL_SHARED
from cuda_traffic import ELEMENT, FLOOR, SCANS, backward_bytes, kept_bytes
from scan_cases import (
    TOLERANCES,
    arguments,
    assert_accurate,
    exact,
    exact_of_case,
    exact_statistics,
    gated_scan_loop,
    output_and_gradients,
    relative_errors,
    scan_loop,
    statistics_error,
)

from model.lib_mamba import gated_scan

pytestmark = pytest.mark.slow

ORDERS = range(3)  # ascending, descending, shuffled


@pytest.fixture(params=[FEW, MANY], ids=["a block an image", "images divided"])
def multiprocessors(request, cuda_as_cpp):
    cuda_as_cpp.set_device(request.param, H200_SHARED)


def assert_same_in_any_order(operators, tensors, **options):
    """A thread that did not wait for another would see something else."""
    results = []
    for order in ORDERS:
        operators.set_order(order)
        results.append(output_and_gradients(gated_scan, tensors, **options))
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))


@pytest.mark.parametrize("shape", [(1, 144, 70, 3), (2, 40, 200, 17), (5, 9, 37, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_the_same_in_whatever_order_threads_run(shape, dtype, cuda_as_cpp, multiprocessors):
    batch, length, channels, rank = shape
    tensors = arguments(length, batch=batch, channels=channels, rank=rank, dtype=dtype)
    assert_same_in_any_order(cuda_as_cpp, tensors)


def test_general_results_are_the_same_in_whatever_order_threads_run(cuda_as_cpp):
    tensors = arguments(19, channels=140, num_states=3, num_directions=3)
    assert_same_in_any_order(cuda_as_cpp, tensors, reverse=(False, True, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(384, 36, 12), (448, 9, 14), (544, 16, 17), (320, 100, 10)], ids=str)
def test_calls_of_the_released_networks(shape, dtype, cuda_as_cpp, multiprocessors):
    channels, length, rank = shape
    tensors = arguments(length, batch=1, channels=channels, rank=rank, dtype=dtype)
    assert_accurate(output_and_gradients(gated_scan, tensors), exact(tensors), dtype, "cuda")


@pytest.mark.parametrize("shape", [(600, 40, 3), (37, 20, 30), (70, 20, 40), (33, 70, 64)], ids=str)
@pytest.mark.parametrize("shared", [H200_SHARED, SMALL_SHARED])
def test_more_channels_and_higher_ranks_than_fit_a_block(shape, shared, cuda_as_cpp):
    channels, length, rank = shape
    cuda_as_cpp.set_device(MANY, shared)
    tensors = arguments(length, batch=1, channels=channels, rank=rank)
    tensors[3] = tensors[3] / rank**0.5
    assert_accurate(output_and_gradients(gated_scan, tensors), exact(tensors), torch.float32, "cuda")


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("length", [1, 3, 9, 16, 49, 64, 144])
def test_float16_and_odd_batches(length, batch, cuda_as_cpp, multiprocessors):
    tensors = arguments(length, batch=batch, dtype=torch.float16)
    actual = output_and_gradients(gated_scan, tensors)
    assert_accurate(actual, exact_of_case(length, torch.float16, batch), torch.float16, "cuda")


def exact_states(tensors, chunk):
    """The states that the forward pass keeps, by the loop that defines the scan, in float64: (B, 2, count, D)."""
    x, _, projection, dt_weight, dt_bias, A_log, *_ = (tensor.double() for tensor in tensors)
    length, channels, rank = x.shape[1], x.shape[2], dt_weight.shape[2]
    kept = []
    for k, own in enumerate(projection.chunk(2, -1)):
        delta = F.softplus(own[..., :rank] @ dt_weight[k].T + dt_bias[k])
        decay = (-delta * A_log.view(2, channels)[k].exp()).exp()
        inputs = delta * own[..., rank, None] * x
        before, state = [None] * length, torch.zeros_like(x[:, 0])
        for t in reversed(range(length)) if k else range(length):
            before[t] = state
            state = decay[:, t] * state + inputs[:, t]
        starts = range(0, length, chunk)
        kept.append(torch.stack([before[min(t + chunk, length) - 1 if k else t] for t in starts], 1))
    return torch.stack(kept, 1)


@pytest.mark.parametrize(
    ("length", "chunk"), [(20, 12), (49, 13), (65, 13), (100, 13), (144, 16), (196, 14), (299, 13), (400, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_forward_pass_keeps(length, chunk, dtype, cuda_as_cpp, multiprocessors):
    tensors = arguments(length, channels=70, dtype=dtype)
    y, states, statistics = torch.ops.mobilemamba.gated_scan_with_states(*tensors, 1e-5, [0, 1])
    assert torch.equal(y, torch.ops.mobilemamba.gated_scan(*tensors, 1e-5, [0, 1]))
    exact_ones = exact_states(tensors, chunk)
    assert states.shape == exact_ones.shape
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    assert (states - exact_ones).abs().max() < tolerance * exact_ones.abs().max()
    assert statistics_error(statistics, exact_statistics(tensors)) < tolerance


# Every scan of the released networks: channels, length, rank.
RELEASED = [
    *((224, 144, 7), (384, 36, 12), (448, 9, 14), (288, 144, 9), (512, 36, 16), (544, 9, 17), (320, 196, 10)),
    *((544, 49, 17), (544, 16, 17), (320, 256, 10), (512, 64, 16), (512, 144, 16), (544, 36, 17), (512, 256, 16)),
    *((544, 64, 17), (320, 576, 10), (320, 1024, 10)),
]


def inputs_of_a_released_network(channels, length, rank, **options):
    tensors = arguments(length, channels=channels, rank=rank, **options)
    tensors[3] = tensors[3] / rank**0.5
    return tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", RELEASED, ids=str)
def test_every_scan_of_the_released_networks(shape, dtype, cuda_as_cpp):
    """In clusters that take several images each, or one; the last of them is compared."""
    length = shape[1]
    batch = 1 if length > 200 else 3
    tensors = inputs_of_a_released_network(*shape, batch=batch, dtype=dtype)
    last = [tensor[-1:] if index < 3 else tensor for index, tensor in enumerate(tensors)]
    exact_y = gated_scan_loop(*(tensor.double() for tensor in last))
    exact_ones = exact_states(last, {36: 12, 9: 9, 196: 14, 49: 13}.get(length, 16)) if length > 16 else None
    found = []
    for order in ORDERS:
        cuda_as_cpp.set_order(order)
        cuda_as_cpp.set_device(FEW if order == 0 else MANY, H200_SHARED)
        found.append(torch.ops.mobilemamba.gated_scan_with_states(*tensors, 1e-5, [0, 1]))
        assert all(torch.equal(one, other) for one, other in zip(found[0], found[-1], strict=True))
    y, states, statistics = found[0]
    assert (y[-1:] - exact_y).abs().max() < 1.2 * TOLERANCES[dtype][0] * exact_y.abs().max()
    if exact_ones is not None:
        assert (states[-1:] - exact_ones).abs().max() < 2e-3 * exact_ones.abs().max()
    assert statistics_error(statistics[-1:], exact_statistics(last)) < 2e-3


@pytest.mark.parametrize("shape", RELEASED, ids=str)
def test_x_z_and_the_result_are_moved_once(shape, cuda_as_cpp):
    """Three values a channel and position: the least that a gated scan can move."""
    tensors = inputs_of_a_released_network(*shape, batch=1, dtype=torch.bfloat16)
    cuda_as_cpp.take_traffic()
    cuda_as_cpp.gated_scan(*tensors, 1e-5, [0, 1])
    assert sum(cuda_as_cpp.take_traffic()) <= 1.1 * 3 * tensors[0].numel() * tensors[0].element_size()


@pytest.mark.parametrize(
    ("multiprocessors", "shared", "most_blocks"),
    [(132, SMALL_SHARED, 16), (132, 99 * 1024, 8), (108, 163 * 1024, 1), (84, 99 * 1024, 1), (132, H200_SHARED, 8)],
    ids=["little memory", "sm_120", "sm_80", "sm_89", "no large clusters"],
)
@pytest.mark.parametrize("shape", [(320, 256, 10), (544, 49, 17), (384, 36, 12)], ids=str)
def test_devices_without_clusters_or_memory(shape, multiprocessors, shared, most_blocks, cuda_as_cpp):
    tensors = inputs_of_a_released_network(*shape, batch=1, dtype=torch.float16)
    cuda_as_cpp.set_device(multiprocessors, shared, most_blocks)
    y = cuda_as_cpp.gated_scan(*tensors, 1e-5, [0, 1])
    exact_y = gated_scan_loop(*(tensor.double() for tensor in tensors))
    assert (y - exact_y).abs().max() < 1.2 * TOLERANCES[torch.float16][0] * exact_y.abs().max()


def test_decays_near_one_do_not_drift(cuda_as_cpp):
    """Every step's error to the same side, as a GPU's approximations may err."""
    tensors = [torch.ones_like(tensor) for tensor in arguments(4000, batch=1, channels=32)]
    tensors[5] = torch.linspace(-10, -8, 64)[:, None]
    _, states, _ = cuda_as_cpp.gated_scan_with_states(*tensors, 1e-5, [0, 1])
    exact_ones = exact_states(tensors, 16)
    torch.testing.assert_close(states.double(), exact_ones, rtol=1e-5, atol=0)
    y, _, *scan = tensors[:7]
    exact_y = scan_loop(*(tensor.double() for tensor in (y, *scan)))
    torch.testing.assert_close(cuda_as_cpp.selective_scan(y, *scan, [0, 1]).double(), exact_y, rtol=1e-5, atol=0)


def test_short_sequences_keep_no_states_and_other_scans_nothing(cuda_as_cpp):
    _, states, statistics = cuda_as_cpp.gated_scan_with_states(*arguments(16), 1e-5, [0, 1])
    assert states.shape == (2, 2, 0, 37)
    assert statistics.shape == (2, 16, 2)
    _, states, statistics = cuda_as_cpp.gated_scan_with_states(*arguments(100, num_states=2), 1e-5, [0, 1])
    assert states.shape == (2, 2, 0, 37)
    assert statistics.shape == (2, 0, 2)


# Channels, length, rank: scans of the released networks, one for each kernel, some of them in clusters.
GRADIENTS = [
    *((224, 144, 7), (288, 144, 9), (320, 196, 10), (320, 256, 10), (384, 36, 12), (448, 9, 14), (512, 36, 16)),
    *((512, 64, 16), (544, 9, 17), (544, 16, 17), (544, 36, 17), (544, 49, 17)),
]
# What a profiler sees of PyTorch that starts nothing on a GPU.
NO_WORK = {"aten::" + name for name in ("_reshape_alias", "contiguous", "empty", "flatten", "reshape", "to", "view")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", GRADIENTS, ids=str)
def test_gradients_of_the_released_networks_scans(shape, dtype, cuda_as_cpp):
    """Blocks that take one block of positions each, or several, and threads in any order: the same, and right."""
    channels, length, rank = shape
    batch = 6 if length <= 16 else 1 if length > 64 else 2
    tensors = arguments(length, batch=batch, channels=channels, rank=rank, dtype=dtype)
    assert_accurate(output_and_gradients(gated_scan, tensors), exact(tensors), dtype, "cuda")
    assert_same_in_any_order(cuda_as_cpp, tensors)
    cuda_as_cpp.set_device(FEW, H200_SHARED)
    assert_accurate(output_and_gradients(gated_scan, tensors), exact(tensors), dtype, "cuda")


@pytest.mark.parametrize("shape", GRADIENTS, ids=str)
def test_what_training_and_its_gradients_move(shape, cuda_as_cpp):
    """To the byte, what the table of the kernels' traffic says."""
    channels, length, _ = shape
    batch = 5 if length <= 16 else 1
    tensors = inputs_of_a_released_network(*shape, batch=batch, dtype=torch.bfloat16)
    cuda_as_cpp.take_traffic()
    y = cuda_as_cpp.gated_scan(*tensors, 1e-5, [0, 1])
    inference = sum(cuda_as_cpp.take_traffic())
    _, *kept = cuda_as_cpp.gated_scan_with_states(*tensors, 1e-5, [0, 1])
    assert sum(cuda_as_cpp.take_traffic()) - inference == batch * kept_bytes(channels, length)
    cuda_as_cpp.gated_scan_backward(y, *tensors, 1e-5, [0, 1], *kept)
    assert cuda_as_cpp.take_traffic() == tuple(batch * count for count in backward_bytes(channels, length))


def test_gradients_move_little_more_than_they_must():
    shares = {scan: sum(backward_bytes(*scan)) / (FLOOR * ELEMENT * scan[0] * scan[1]) for scan in SCANS}
    assert {scan: share for scan, share in shares.items() if share > (1.6 if scan[1] > 256 else 1.45)} == {}


@pytest.mark.parametrize(
    ("shared", "most_blocks"),
    [(99 * 1024, 8), (99 * 1024, 1), (163 * 1024, 1), (H200_SHARED, 8)],
    ids=["sm_120", "sm_89", "sm_80", "no large clusters"],
)
@pytest.mark.parametrize("shape", [(70, 20, 7), (320, 196, 10), (38, 1100, 3), (384, 36, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_on_devices_without_clusters_or_memory(dtype, shape, shared, most_blocks, cuda_as_cpp):
    channels, length, rank = shape
    cuda_as_cpp.set_device(MANY, shared, most_blocks)
    tensors = arguments(length, batch=1, channels=channels, rank=rank, dtype=dtype)
    assert_accurate(output_and_gradients(gated_scan, tensors), exact(tensors), dtype, "cuda")


@pytest.mark.parametrize("length", [1, 2, 9, 13, 16, 17, 31, 33, 48, 63, 64, 65, 70, 100, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_at_any_length(length, dtype, cuda_as_cpp, multiprocessors):
    tensors = arguments(length, batch=5, channels=70, rank=5, dtype=dtype)
    assert_accurate(output_and_gradients(gated_scan, tensors), exact(tensors), dtype, "cuda")


@pytest.mark.parametrize(("length", "most_blocks", "launches"), [(16, 16, 3), (64, 1, 3), (196, 16, 3), (196, 1, 4)])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_all_gradients_take_at_most_four_launches(length, most_blocks, launches, parameters, cuda_as_cpp):
    cuda_as_cpp.set_device(MANY, H200_SHARED, most_blocks)
    tensors = arguments(length, batch=2, channels=320, rank=10, dtype=torch.bfloat16)
    tensors[3:] = [tensor.to(parameters) for tensor in tensors[3:]]
    y, *kept = cuda_as_cpp.gated_scan_with_states(*tensors, 1e-5, [0, 1])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients = cuda_as_cpp.gated_scan_backward(y, *tensors, 1e-5, [0, 1], *kept)
    work = [event.name for event in profile.events() if event.name not in NO_WORK]
    assert [name for name in work if name.startswith("aten::")] == []
    assert work.count("launch") == launches
    assert [one.dtype for one in gradients] == [tensor.dtype for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(70, 100, 5), (544, 49, 17), (544, 9, 17)], ids=str)
def test_gradients_find_what_is_not_given(shape, dtype, cuda_as_cpp, multiprocessors):
    channels, length, rank = shape
    tensors = arguments(length, channels=channels, rank=rank, dtype=dtype)
    y, states, statistics = cuda_as_cpp.gated_scan_with_states(*tensors, 1e-5, [0, 1])
    inputs = [tensor.double().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(gated_scan_loop(*inputs), inputs, y.double())
    given = cuda_as_cpp.gated_scan_backward(y, *tensors, 1e-5, [0, 1], states, statistics)
    assert_accurate((y, *given), (y.double(), *expected), dtype, "cuda")
    for kept in [(), (states,), (None, statistics), (states[:0], statistics[:0])]:
        found = cuda_as_cpp.gated_scan_backward(y, *tensors, 1e-5, [0, 1], *kept)
        assert all(torch.equal(one, other) for one, other in zip(given, found, strict=True))


def test_gradients_refuse_what_was_kept_for_another_scan(cuda_as_cpp):
    tensors = arguments(100, channels=70, rank=5)
    y, states, statistics = cuda_as_cpp.gated_scan_with_states(*tensors, 1e-5, [0, 1])
    with pytest.raises(RuntimeError, match="states must be"):
        cuda_as_cpp.gated_scan_backward(y, *tensors, 1e-5, [0, 1], states[:, :, :1], statistics)
    with pytest.raises(RuntimeError, match="statistics must be"):
        cuda_as_cpp.gated_scan_backward(y, *tensors, 1e-5, [0, 1], states, statistics[:, :9])


@pytest.mark.parametrize("channels", [320, 70])
def test_gradients_of_parts_of_wider_tensors(channels, cuda_as_cpp):
    """Rows that lie further apart than their channels, and begin anywhere."""
    tensors = arguments(40, channels=channels, rank=10, dtype=torch.bfloat16)
    x, *others = tensors
    for place in range(3):
        wide = torch.randn(2, 40, 2 * channels + 2).to(torch.bfloat16)
        wide[..., place : channels + place] = x
        actual = output_and_gradients(gated_scan, [wide[..., place : channels + place], *others])
        assert_accurate(actual, exact(tensors), torch.bfloat16, "cuda")


def test_gradients_of_sums_beyond_float16(cuda_as_cpp):
    """What a chunk parks is scaled: neither sums of the directions nor their gradients overflow."""
    tensors = arguments(64, batch=1, channels=320, rank=10, dtype=torch.float16)
    tensors[0] *= 200
    tensors[2].unflatten(-1, (2, -1))[..., -2:] *= 15
    actual, expected = output_and_gradients(gated_scan, tensors), exact(tensors)
    errors = relative_errors(actual, expected)
    assert {name: error for name, error in errors.items() if not error <= 4e-3} == {}


def test_gradients_through_decays_near_one(cuda_as_cpp):
    """Memories as long as the sequence, which blocks hand on to each other: nothing drifts."""
    tensors = arguments(1000, batch=1, channels=32)
    tensors[0] += 1
    tensors[2][..., 3:5] = tensors[2][..., 3:5].abs()
    tensors[5] = torch.linspace(-9, -6, 64)[:, None]
    assert_accurate(output_and_gradients(gated_scan, tensors), exact(tensors), torch.float32, "cuda")
