"""Builds `mobilemamba_kernels`: the scans and other layers in C++, and where nvcc is found, the scans in CUDA C++ too.

Where CUDA cannot be built, the library is built without it, and build.json says why, with the compiler's errors;
FORCE_CUDA=1 stops there instead, FORCE_CUDA=0 leaves CUDA out. TORCH_CUDA_ARCH_LIST and MAX_JOBS are PyTorch's own.
The library holds operators and nothing of Python: any interpreter with the same PyTorch can load it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(f"mobilemamba_kernels is built against the installed PyTorch: install torch first ({error})")

NAME = "mobilemamba_kernels._C"
VERSION = "1.0.0"
FOLDER = Path(__file__).resolve().parent
CSRC = FOLDER / "csrc"
FORCE_CUDA = os.environ.get("FORCE_CUDA", "")
# Threads are PyTorch's, and so is the OpenMP library: compiled for it, but not linked to another one.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
CXX_FLAGS = [
    "-O3",
    "-g0",  # Python's own flags ask for debugging information, three times the size of the code
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wno-psabi",
    *OPENMP,
]
NVCC_FLAGS = ["-O3", "--use_fast_math"]
# Without a GPU in this machine: binaries for Ampere and Hopper, and PTX for later ones.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
OLDEST_PYTHON = "3.10"
# "scan.cu(7): error: ...", "c++: fatal error: Killed ...", "ptxas error : ...", "nvcc fatal   : ...", "... Error 1"
ERROR = re.compile(r"\b(?:fatal )?error\b *[:#]|\bfatal +:|ld returned", re.IGNORECASE)
NUM_ERRORS = 20


def sources(*patterns: str) -> list[str]:
    """Return source files, relative to this one."""
    return sorted(str(path.relative_to(FOLDER)) for pattern in patterns for path in CSRC.rglob(pattern))


def nvcc() -> Path | None:
    """Return the CUDA compiler, None where there is none."""
    path = Path(CUDA_HOME or "", "bin", "nvcc")
    return path if CUDA_HOME is not None and path.is_file() else None


def cuda_problem() -> str:
    """Return why CUDA cannot be built, or nothing."""
    if not sources("*.cu"):
        return "there are no CUDA sources"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    compiler = nvcc()
    if compiler is None:
        return "nvcc is not found (install the CUDA toolkit, or set CUDA_HOME)"
    output = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.", output)
    wanted = torch.version.cuda.split(".")[0]
    if found is None or found[1] != wanted:
        return f"nvcc is of CUDA {found[1] if found else '?'}, PyTorch of CUDA {torch.version.cuda}"
    return ""


def toolkit() -> Path:
    """Return the folder of the CUDA toolkit that nvcc itself uses: the nvcc on the path may be a script elsewhere."""
    command = [str(nvcc()), "--dryrun", "-E", "-x", "cu", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    here = re.search(r"^#\$ _HERE_=(.+)$", done.stdout + done.stderr, re.MULTILINE)
    return Path(here[1]).resolve().parent if here else Path(str(CUDA_HOME))


def cuda_runtime() -> dict[str, list[str]]:
    """Return how to link the CUDA runtime: the toolkit's, or where it has none, the one that comes with PyTorch."""
    for folder in (toolkit() / "lib64", toolkit() / "lib"):
        if (folder / "libcudart.so").exists():
            return {"libraries": ["cudart"], "library_dirs": [str(folder)]}
    spec = importlib.util.find_spec("nvidia")
    name = f"libcudart.so.{str(torch.version.cuda).split('.')[0]}"
    for root in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(root).glob(f"*/lib/{name}")):
            return {"libraries": [f":{name}"], "library_dirs": [str(path.parent)]}
    return {"libraries": ["cudart"]}


def why_without_cuda() -> str:
    """Return why CUDA is left out, or nothing. Exits where it is required and cannot be built."""
    if FORCE_CUDA == "0":
        return "FORCE_CUDA=0"
    problem = cuda_problem()
    if problem and FORCE_CUDA:
        sys.exit(f"FORCE_CUDA is set, but {problem}")
    return problem


def compiler_errors(output: str) -> list[str]:
    """Return the lines of a compiler's output that name an error, each once, the first ones."""
    lines = (line.strip() for line in output.splitlines() if ERROR.search(line))
    return list(dict.fromkeys(lines))[:NUM_ERRORS]


@contextmanager
def recorded_output() -> Iterator[list[bytes]]:
    """Collect what this process and the compilers write to stdout and stderr, and pass it on at once."""
    collected: list[bytes] = []
    kept = [os.dup(1), os.dup(2)]
    reading, writing = os.pipe()

    def pass_on() -> None:
        while data := os.read(reading, 1 << 16):
            collected.append(data)
            os.write(kept[0], data)

    thread = threading.Thread(target=pass_on)
    thread.start()
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)
    try:
        yield collected
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        thread.join()  # the last writing end is closed
        for number in (reading, *kept):
            os.close(number)


class Build(BuildExtension):
    """Compiles, without CUDA if that fails, and writes next to the library what it was built for."""

    def build_extensions(self) -> None:
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            sys.exit(
                f"no C++ compiler ({compiler}): install one (g++ 9 or newer, or clang), or do without "
                "mobilemamba_kernels: MobileMamba then runs on Triton or plain PyTorch"
            )
        without_cuda = why_without_cuda()
        # With nvcc there, CUDA was wanted: what stood in its way is shown at run time, on a GPU.
        errors = [without_cuda] if without_cuda and FORCE_CUDA != "0" and nvcc() else []
        if not without_cuda:
            without_cuda, errors = self._build_with_cuda()
        if without_cuda:
            print(f"mobilemamba_kernels is built only for the CPU: {without_cuda}", file=sys.stderr)
            vars(self.extensions[0]).update(vars(cpu_extension()))  # in place, as setuptools has prepared it
            super().build_extensions()
        library = Path(self.get_ext_fullpath(NAME))
        info = {
            "version": VERSION,
            "schemas": hashlib.sha256((CSRC / "operators.cpp").read_bytes()).hexdigest(),
            "library": library.name,
            "torch": torch.__version__.split("+")[0],
            "cuda": None if without_cuda else torch.version.cuda,
            "architectures": None if without_cuda else os.environ.get("TORCH_CUDA_ARCH_LIST", "of the GPUs found"),
            "without_cuda": without_cuda,
            "cuda_errors": errors,
        }
        library.with_name("build.json").write_text(json.dumps(info, indent=2) + "\n")

    def _build_with_cuda(self) -> tuple[str, list[str]]:
        """Compile, link and load the library; return why that failed and the compiler's errors.

        Raises whatever failed where CUDA is required.
        """
        with recorded_output() as output:
            try:
                super().build_extensions()
                torch.ops.load_library(self.get_ext_fullpath(NAME))
            except (Exception, SystemExit) as error:  # of any kind: the CPU's part does without
                if FORCE_CUDA:
                    raise
                problem = str(error).strip() or type(error).__name__
            else:
                return "", []
        errors = compiler_errors(b"".join(output).decode(errors="replace")) or problem.splitlines()[:NUM_ERRORS]
        return f"the CUDA part failed to build: {errors[0]}", errors


def cpu_extension() -> Extension:
    """Return the library for the CPU only."""
    return CppExtension(
        NAME,
        sources("*.cpp"),
        include_dirs=[str(CSRC)],
        extra_compile_args={"cxx": CXX_FLAGS},
        py_limited_api=True,  # not linked to PyTorch's Python part
    )


def cuda_extension() -> Extension:
    """Return the library for CPU and CUDA."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    runtime = cuda_runtime()
    extension = CUDAExtension(
        NAME,
        sources("*.cpp", "*.cu"),
        include_dirs=[str(CSRC)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        library_dirs=runtime.get("library_dirs", []),
        py_limited_api=True,
    )
    extension.libraries.remove("cudart")  # which PyTorch adds by that name, wherever it is
    extension.libraries += runtime["libraries"]
    return extension


if __name__ == "__main__":
    setup(
        name="mobilemamba_kernels",
        version=VERSION,
        description="The compiled kernels of MobileMamba",
        license="MIT",
        python_requires=f">={OLDEST_PYTHON}",
        packages=["mobilemamba_kernels"],
        ext_modules=[cpu_extension() if why_without_cuda() else cuda_extension()],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp" + OLDEST_PYTHON.replace(".", "")}},
    )
