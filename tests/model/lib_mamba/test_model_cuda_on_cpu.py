"""The CUDA kernels compiled as C++ (cuda_as_cpp.py): orders of threads, sizes of devices, the released networks' calls.

The tests of every backend run on them too, under `backend` in conftest.py.
"""

from __future__ import annotations

import pytest
import torch
from cuda_as_cpp import FEW, H200_SHARED, MANY, SMALL_SHARED
from scan_cases import arguments, assert_accurate, exact, exact_of_case, output_and_gradients

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
