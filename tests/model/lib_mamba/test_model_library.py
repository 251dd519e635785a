"""The compiled library: found, refused where it was built for something else, built by the published command."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.lib_mamba import backends, compiled, info, library

pytestmark = pytest.mark.usefixtures("fresh_choice")

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "model" / "lib_mamba" / "kernels" / "selective_scan"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make a package `mobilemamba_kernels` with a given build.json and a library that cannot be loaded."""

    def make(**build):
        folder = tmp_path / library.PACKAGE
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "_C.so").write_text("not a library")
        running = torch.__version__.split("+")[0]
        fields = {
            "version": "1.0.0",
            "schemas": library.fingerprint(),
            "library": "_C.so",
            "torch": running,
            "cuda": None,
        }
        (folder / "build.json").write_text(json.dumps(fields | build))
        monkeypatch.syspath_prepend(tmp_path)
        return folder

    return make


def test_a_library_for_another_pytorch_is_never_loaded(package, monkeypatch):
    package(torch="1.13.1")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    is_available, reason = compiled.cpu.is_available()
    assert not is_available
    assert f"built for torch 1.13.1, this is {torch.__version__.split('+')[0]}: build it again" in reason
    assert backends.choose("cpu").name == "reference"


def test_a_library_for_another_version_of_the_operators_is_never_loaded(package):
    package(schemas="of other operators")
    assert "of another version" in compiled.cpu.is_available()[1]


def test_a_damaged_library_is_reported(package):
    package()
    is_available, reason = compiled.cpu.is_available()
    assert not is_available
    assert "does not load, build it again" in reason


def test_an_incomplete_package_is_reported(package):
    (package() / "build.json").write_text("{")
    assert "is incomplete: build it again" in compiled.cpu.is_available()[1]


@pytest.fixture
def setup_script():
    """The module setup.py, which builds nothing unless it is run."""
    spec = importlib.util.spec_from_file_location("kernels_setup", KERNELS / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMPILER_OUTPUT = """
[7/18] /usr/local/cuda/bin/nvcc -Werror=all-warnings -c scan/error.cu
scan.cuh(12): warning #177-D: variable "error" was declared but never referenced
scan.cuh(30): error: identifier "warp" is undefined
scan.cuh(30): error: identifier "warp" is undefined
ptxas error   : Entry function uses too much shared data
nvcc fatal   : Unsupported gpu architecture 'compute_20'
c++: fatal error: Killed signal terminated program cc1plus
ninja: build stopped: subcommand failed.
"""


def test_the_errors_in_a_compilers_output_are_found(setup_script):
    assert setup_script.compiler_errors(COMPILER_OUTPUT) == [
        'scan.cuh(30): error: identifier "warp" is undefined',
        "ptxas error   : Entry function uses too much shared data",
        "nvcc fatal   : Unsupported gpu architecture 'compute_20'",
        "c++: fatal error: Killed signal terminated program cc1plus",
    ]


def test_a_compilers_output_is_recorded_and_shown(setup_script, capfd):
    with setup_script.recorded_output() as output:
        subprocess.run("echo one; echo two >&2", shell=True, check=True)
    print("three")
    assert b"".join(output).split() == [b"one", b"two"]
    assert capfd.readouterr().out.split() == ["one", "two", "three"]


def test_why_there_is_no_cuda_though_nvcc_is_there_is_shown(package):
    package(without_cuda="the CUDA part failed to build: a.cu(1): error: x", cuda_errors=["a.cu(1): error: x"])
    assert library.cuda_errors() == ["a.cu(1): error: x"]
    assert "  a.cu(1): error: x" in info.describe()


@pytest.mark.slow
def test_the_published_command_builds_the_kernels(tmp_path):
    """`pip install .` with the isolation that pip has by default, against the PyTorch that is installed."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    source, target = tmp_path / "selective_scan", tmp_path / "installed"
    shutil.copytree(KERNELS, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, "."]
    environment = os.environ | {"FORCE_CUDA": "0", "MAX_JOBS": "2"}
    subprocess.run(command, cwd=source, env=environment, check=True)
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "model.lib_mamba.info"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "self-check of cpu on cpu: passed" in result.stdout
    # Any interpreter can load it: it needs no symbol of Python, nor the part of PyTorch that is made for one.
    (built,) = (target / library.PACKAGE).glob("_C*.so")
    assert b"libtorch_python" not in built.read_bytes()
    symbols = subprocess.run(["nm", "-D", "--undefined-only", built], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\bat::\w+|\b_ZN2at\w+", symbols)
    assert not re.findall(r"\b_?Py[A-Z]\w+", symbols)


@pytest.mark.slow
def test_a_cuda_part_that_fails_to_build_leaves_the_rest(tmp_path):
    if shutil.which("c++") is None or torch.version.cuda is None:
        pytest.skip("no C++ compiler, or a PyTorch without CUDA")
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "release {torch.version.cuda}, V{torch.version.cuda}.1"\n'
    )
    nvcc.write_text(nvcc.read_text() + 'case "$*" in *csrc*) echo "a.cu(1): error: no" >&2; exit 1;; esac\n')
    nvcc.chmod(0o755)
    source, target = tmp_path / "selective_scan", tmp_path / "installed"
    shutil.copytree(KERNELS, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, "."]
    environment = os.environ | {"CUDA_HOME": str(tmp_path / "cuda"), "MAX_JOBS": "2"}
    environment.pop("FORCE_CUDA", None)
    subprocess.run(command, cwd=source, env=environment, check=True)
    build = json.loads((target / library.PACKAGE / "build.json").read_text())
    assert build["cuda"] is None
    assert build["without_cuda"] == "the CUDA part failed to build: a.cu(1): error: no"
    assert build["cuda_errors"][0] == "a.cu(1): error: no"
    assert (target / library.PACKAGE / build["library"]).is_file()
    forced = subprocess.run(command, cwd=source, env=environment | {"FORCE_CUDA": "1"}, check=False)
    assert forced.returncode != 0
