"""Builds `mobilemamba_kernels`: the scans in C++, and with FORCE_CUDA=1 in CUDA C++ too.

CUDA is not built unless asked for, since its kernels have been compiled but not yet run on a GPU.
TORCH_CUDA_ARCH_LIST and MAX_JOBS are PyTorch's own switches.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(f"mobilemamba_kernels is built against the installed PyTorch: install torch first ({error})")

VERSION = "1.0.0"
SCHEMA = 2  # as in model/lib_mamba/compiled.py
FOLDER = Path(__file__).resolve().parent
# Threads are PyTorch's, and so is the OpenMP library: compiled for it, but not linked to one of its own.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
CXX_FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wno-psabi",
    *OPENMP,
]
NVCC_FLAGS = ["-O3", "--use_fast_math", "-lineinfo"]
# Where no GPU is at hand to build for: binaries for Ampere and Hopper, and PTX for what follows.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def sources(*patterns: str) -> list[str]:
    """Return source files, relative to this one."""
    return sorted(str(path.relative_to(FOLDER)) for pattern in patterns for path in FOLDER.glob(f"csrc/{pattern}"))


def cuda_problem() -> str:
    """Return why CUDA cannot be built, or nothing."""
    if not sources("*.cu"):
        return "there are no CUDA sources"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if CUDA_HOME is None or not nvcc.is_file():
        return "nvcc is not found (install the CUDA toolkit, or set CUDA_HOME)"
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.", output)
    wanted = torch.version.cuda.split(".")[0]
    if found is None or found[1] != wanted:
        return f"nvcc is of CUDA {found[1] if found else '?'}, PyTorch of CUDA {torch.version.cuda}"
    return ""


def wheel_headers() -> list[str]:
    """Return where PyPI's CUDA packages keep the headers that a small CUDA toolkit lacks."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return [str(path) for folder in folders for path in sorted(Path(folder).glob("*/include"))]


def wants_cuda() -> bool:
    """Return whether to build CUDA, which has to be asked for. Exits where it is asked for and cannot be built."""
    if os.environ.get("FORCE_CUDA", "0") in ("", "0"):
        return False
    problem = cuda_problem()
    if problem:
        sys.exit(f"FORCE_CUDA is set, but {problem}")
    return True


class Build(BuildExtension):
    """Compiles, and writes beside the library what it was built for."""

    def build_extensions(self) -> None:
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            sys.exit(
                f"no C++ compiler ({compiler}): install one (g++ 9 or newer, or clang), or do without "
                "mobilemamba_kernels: MobileMamba then runs on Triton or plain PyTorch"
            )
        super().build_extensions()
        (extension,) = self.extensions
        library = Path(self.get_ext_fullpath(extension.name))
        info = {
            "version": VERSION,
            "schema": SCHEMA,
            "library": library.name,
            "torch": torch.__version__.split("+")[0],
            "cuda": torch.version.cuda if any(name.endswith(".cu") for name in extension.sources) else None,
        }
        library.with_name("build.json").write_text(json.dumps(info, indent=2) + "\n")


def extension() -> Extension:
    """Return the library to build."""
    if not wants_cuda():
        return CppExtension("mobilemamba_kernels._C", sources("*.cpp"), extra_compile_args={"cxx": CXX_FLAGS})
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    return CUDAExtension(
        "mobilemamba_kernels._C",
        sources("*.cpp", "*.cu"),
        include_dirs=wheel_headers(),
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )


setup(
    name="mobilemamba_kernels",
    version=VERSION,
    description="The compiled scans of MobileMamba",
    license="MIT",
    python_requires=">=3.10",
    packages=["mobilemamba_kernels"],
    ext_modules=[extension()],
    cmdclass={"build_ext": Build},
)
