"""The CPU kernels as plain C++, without PyTorch: for 64-bit Arm on an emulator, against double precision."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "model/lib_mamba/kernels/selective_scan/csrc"
# Those of setup.py that change numbers; static, as the emulator has no libraries of Arm.
FLAGS = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi", "-static"]


@pytest.mark.slow
def test_kernels_for_arm(tmp_path):
    """Vectors of NEON, at sizes that do and do not fill them."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs a cross compiler and an emulator: apt install g++-aarch64-linux-gnu qemu-user")
    kernels = ['-DSET="sets/portable.cpp"', "-DKERNELS=portable_kernels", f"-I{CSRC}"]
    source, program = HERE / "kernels_as_cpp/check.cpp", tmp_path / "check"
    subprocess.run([compiler, *FLAGS, *kernels, source, "-o", program], check=True, timeout=600)
    done = subprocess.run([emulator, program], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("NEON\n")
    checked = {line.split()[0] for line in done.stdout.splitlines()[1:]}
    assert checked == {"dense", "dense_weight_gradient", "depthwise", "wavelet", "scan"}
