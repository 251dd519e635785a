"""The backends that the tests of the scans run over."""

from __future__ import annotations

import shutil

import pytest
import torch
from cuda_as_cpp import FEW, H200_SHARED, LIBRARY, MANY, as_backend, build, load
from filelock import FileLock
from scan_cases import Backend

from model.lib_mamba import backends, library, use_backend

# The CUDA kernels as C++: on a device so small that a block takes an image, and on one for which images are divided.
CUDA_AS_CPP = {"cuda_as_cpp_whole_images": FEW, "cuda_as_cpp_divided_images": MANY}


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted: short enough for Triton's interpreter (TRITON_INTERPRET=1)")


@pytest.fixture(autouse=True)
def exact_convolutions():
    """On a GPU, PyTorch would round what convolutions multiply to TF32, and which do depends on the compiler."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture
def fresh_choice():
    """Start, and leave, as if no backend had been chosen yet."""

    def forget():
        caches = (backends.availability, backends._load, backends._choose, backends._warn)
        for cache in (*caches, library.build_info, library.load):
            cache.cache_clear()
        backends._request.name = None

    forget()
    yield
    forget()


@pytest.fixture(scope="session")
def cuda_operators(tmp_path_factory, worker_id):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if worker_id == "master":
        return load(build(tmp_path_factory.mktemp("cuda_on_cpu"), compiler))
    folder = tmp_path_factory.getbasetemp().parent / "cuda_on_cpu"  # of all the processes that test
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            build(folder, compiler)
    return load(folder / LIBRARY)


@pytest.fixture
def cuda_as_cpp(cuda_operators, monkeypatch):
    """Run the scans on the CUDA kernels compiled as C++; return their operators."""
    choice = backends.Choice("cuda", as_backend(cuda_operators), "on the CPU")
    monkeypatch.setattr(backends, "choose", lambda device: choice)
    monkeypatch.setattr(backends, "keeps_states", lambda device: True)
    yield cuda_operators
    cuda_operators.set_order(0)
    cuda_operators.set_device(MANY, H200_SHARED)


@pytest.fixture(
    params=[
        "reference",
        "cpu",
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
        *(pytest.param(name, marks=pytest.mark.slow) for name in CUDA_AS_CPP),
    ]
)
def backend(request, require_backend):
    """Every backend, on its device; one that cannot run here is skipped and says why. Triton's may be interpreted."""
    if request.param in CUDA_AS_CPP:
        request.getfixturevalue("cuda_as_cpp").set_device(CUDA_AS_CPP[request.param], H200_SHARED)
        yield Backend("cuda", torch.device("cpu"))
        return
    require_backend(request.param)
    with use_backend(request.param):
        yield Backend(request.param, torch.device("cpu" if backends.serves(request.param, "cpu") else "cuda"))
