"""The CUDA kernels without a GPU: compiled as C++, every thread of a block a fiber (cuda_on_cpu/).

Memory is guarded and poisoned: memory that was never written reads as NaN, and an access beyond the end of a tensor
ends the process. A GPU's own instructions, and its speed, are not tested here.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[3]
SHIM = Path(__file__).parent / "cuda_on_cpu"
KERNELS = ROOT / "model" / "lib_mamba" / "kernels" / "selective_scan" / "csrc"
CUDA = KERNELS / "scan" / "cuda"
KERNEL_SOURCES = [CUDA / f"{name}.cu" for name in ("gated_scan", "gated_scan_backward", "general_scan")]
SOURCES = [*KERNEL_SOURCES, SHIM / "fibers.cpp", SHIM / "operators.cpp"]
OPERATORS = (
    "gated_scan",
    "gated_scan_with_states",
    "gated_scan_backward",
    "selective_scan",
    "selective_scan_backward",
)
# Multiprocessors and shared memory of a block, which decide how the work is divided.
FEW, MANY = 1, 132
LIBRARY = "cuda_on_cpu.so"
H200_SHARED, SMALL_SHARED = 227 * 1024, 48 * 1024


def build(folder, compiler):
    """Compile the kernels into a library in a folder, and return its path."""
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
    library = folder / LIBRARY
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, "-shared", *checks, "-o", library, *objects, *libraries], check=True)
    return library


def load(library):
    """Return the operators of a library."""
    torch.ops.load_library(str(library))
    return torch.ops.mobilemamba_cuda_on_cpu


def as_backend(operators):
    """Return what `model.lib_mamba.backends` takes: the operators, run in guarded memory on guarded copies."""

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

    return SimpleNamespace(**{name: function(name) for name in OPERATORS})
