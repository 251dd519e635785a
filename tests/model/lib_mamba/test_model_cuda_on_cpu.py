"""The CUDA kernels without a GPU: compiled as C++, every thread of a block a fiber (cuda_on_cpu/).

Memory is guarded and poisoned: memory that was never written reads as NaN, and an access beyond the end of a tensor
ends the process. A GPU's own instructions, and its speed, are not tested here.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scan_cases import arguments, assert_accurate, exact, exact_of_case, output_and_gradients
from test_model_scan_backends import (
    poisoned_memory,
    test_an_image_does_not_depend_on_its_batch,
    test_any_number_of_channels,
    test_any_set_of_directions_and_states,
    test_autocast_keeps_the_scan_in_float32,
    test_both_sequences_may_be_views,
    test_channels_need_not_lie_side_by_side,
    test_compiles_without_graph_breaks,
    test_empty_batch,
    test_extreme_time_steps_and_gates,
    test_long_memory,
    test_not_a_number_is_passed_on,
    test_opcheck,
    test_output_and_every_gradient_against_float64,
    test_results_are_the_same_from_run_to_run,
    test_sequences_of_two_types,
)
from torch.utils.cpp_extension import include_paths, library_paths

from model.lib_mamba import backends, gated_scan

__all__ = [  # the tests of every backend, here with the `backend` below
    "poisoned_memory",
    "test_an_image_does_not_depend_on_its_batch",
    "test_any_number_of_channels",
    "test_any_set_of_directions_and_states",
    "test_autocast_keeps_the_scan_in_float32",
    "test_both_sequences_may_be_views",
    "test_channels_need_not_lie_side_by_side",
    "test_compiles_without_graph_breaks",
    "test_empty_batch",
    "test_extreme_time_steps_and_gates",
    "test_long_memory",
    "test_not_a_number_is_passed_on",
    "test_opcheck",
    "test_output_and_every_gradient_against_float64",
    "test_results_are_the_same_from_run_to_run",
    "test_sequences_of_two_types",
]
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SHIM = Path(__file__).parent / "cuda_on_cpu"
KERNELS = ROOT / "model" / "lib_mamba" / "kernels" / "selective_scan" / "csrc"
CUDA = KERNELS / "scan" / "cuda"
SOURCES = [CUDA / "gated_scan.cu", CUDA / "general_scan.cu", SHIM / "fibers.cpp", SHIM / "operators.cpp"]
OPERATORS = ("gated_scan", "gated_scan_backward", "selective_scan", "selective_scan_backward")
# Multiprocessors and shared memory of a block, which decide how the work is divided.
FEW, MANY = 1, 132
H200_SHARED, SMALL_SHARED = 227 * 1024, 48 * 1024
ORDERS = range(3)  # ascending, descending, shuffled


@pytest.fixture(scope="session")
def operators(tmp_path_factory):
    """Compile the CUDA kernels for the CPU; return them as operators."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    # Alignment is checked as the code runs: a GPU refuses a vector that does not lie at a multiple of its size.
    checks = ["-fsanitize=alignment", "-fno-sanitize-recover", "-static-libubsan"]
    options = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=fast", "-U_FORTIFY_SOURCE", *checks]
    options += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-include", str(SHIM / "device.h")]
    options += [f"-I{path}" for path in (SHIM, KERNELS, *include_paths())]
    objects = [folder / f"{source.name}.o" for source in SOURCES]
    running = [
        subprocess.Popen([compiler, *options, "-x", "c++", "-c", source, "-o", target])
        for source, target in zip(SOURCES, objects, strict=True)
    ]
    assert [process.wait() for process in running] == [0] * len(SOURCES)
    library = folder / "cuda_on_cpu.so"
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, "-shared", *checks, "-o", library, *objects, *libraries], check=True)
    torch.ops.load_library(str(library))
    return torch.ops.mobilemamba_cuda_on_cpu


@pytest.fixture
def cuda(operators, monkeypatch):
    """Run the scans on the CUDA kernels, in guarded memory; return the operators."""

    def guarded(argument):
        if not isinstance(argument, torch.Tensor):
            return argument
        storage = argument.untyped_storage().clone()
        place = (argument.storage_offset(), argument.size(), argument.stride())
        return torch.empty(0, dtype=argument.dtype).set_(storage, *place)

    def function(name):
        def run(*arguments):
            if arguments[1].dtype == torch.float64:
                return NotImplemented
            operators.guard_memory(True)
            try:
                return getattr(operators, name)(*map(guarded, arguments))
            finally:
                operators.guard_memory(False)

        return run

    backend = SimpleNamespace(**{name: function(name) for name in OPERATORS})
    monkeypatch.setattr(backends, "choose", lambda device: backends.Choice("cuda", backend, "on the CPU"))
    yield operators
    operators.set_order(0)
    operators.set_device(MANY, H200_SHARED)


@pytest.fixture(params=[FEW, MANY], ids=["a block an image", "images divided"])
def backend(request, cuda):
    cuda.set_device(request.param, H200_SHARED)
    return "cuda"


@pytest.mark.parametrize("shape", [(1, 144, 70, 3), (2, 40, 200, 17), (5, 9, 37, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_the_same_in_whatever_order_threads_run(shape, dtype, cuda, backend):
    """A thread that did not wait for another would see something else."""
    batch, length, channels, rank = shape
    tensors = arguments(length, batch=batch, channels=channels, rank=rank, dtype=dtype)
    results = []
    for order in ORDERS:
        cuda.set_order(order)
        results.append(output_and_gradients(gated_scan, tensors))
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))


def test_general_results_are_the_same_in_whatever_order_threads_run(cuda):
    tensors = arguments(19, channels=140, num_states=3, num_directions=3)
    results = []
    for order in ORDERS:
        cuda.set_order(order)
        results.append(output_and_gradients(gated_scan, tensors, reverse=(False, True, True)))
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(384, 36, 12), (448, 9, 14), (544, 16, 17), (320, 100, 10)], ids=str)
def test_calls_of_the_released_networks(shape, dtype, cuda, backend):
    channels, length, rank = shape
    tensors = arguments(length, batch=1, channels=channels, rank=rank, dtype=dtype)
    assert_accurate(output_and_gradients(gated_scan, tensors), exact(tensors), dtype, backend)


@pytest.mark.parametrize("shape", [(600, 40, 3), (37, 20, 30), (70, 20, 40), (33, 70, 64)], ids=str)
@pytest.mark.parametrize("shared", [H200_SHARED, SMALL_SHARED])
def test_more_channels_and_higher_ranks_than_fit_a_block(shape, shared, cuda):
    channels, length, rank = shape
    cuda.set_device(MANY, shared)
    tensors = arguments(length, batch=1, channels=channels, rank=rank)
    tensors[3] = tensors[3] / rank**0.5
    assert_accurate(output_and_gradients(gated_scan, tensors), exact(tensors), torch.float32, "cuda")


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("length", [1, 3, 9, 16, 49, 64, 144])
@pytest.mark.parametrize("multiprocessors", [FEW, MANY])
def test_float16_and_odd_batches(length, batch, multiprocessors, cuda):
    cuda.set_device(multiprocessors, H200_SHARED)
    tensors = arguments(length, batch=batch, dtype=torch.float16)
    actual = output_and_gradients(gated_scan, tensors)
    assert_accurate(actual, exact_of_case(length, torch.float16, batch), torch.float16, "cuda")
