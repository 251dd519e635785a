"""The compiled library: found, refused where it was built for something else, built by the published command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.lib_mamba import backends, compiled, library

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


@pytest.mark.slow
def test_a_cuda_part_that_fails_to_build_leaves_the_rest(tmp_path):
    if shutil.which("c++") is None or torch.version.cuda is None:
        pytest.skip("no C++ compiler, or a PyTorch without CUDA")
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "release {torch.version.cuda}, V{torch.version.cuda}.1"\n'
    )
    nvcc.write_text(nvcc.read_text() + 'case "$*" in *csrc*) exit 1;; esac\n')
    nvcc.chmod(0o755)
    source, target = tmp_path / "selective_scan", tmp_path / "installed"
    shutil.copytree(KERNELS, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, "."]
    environment = os.environ | {"CUDA_HOME": str(tmp_path / "cuda"), "MAX_JOBS": "2"}
    environment.pop("FORCE_CUDA", None)
    subprocess.run(command, cwd=source, env=environment, check=True)
    build = json.loads((target / library.PACKAGE / "build.json").read_text())
    assert build["cuda"] is None
    assert "the CUDA part failed to build" in build["without_cuda"]
    assert (target / library.PACKAGE / build["library"]).is_file()
    forced = subprocess.run(command, cwd=source, env=environment | {"FORCE_CUDA": "1"}, check=False)
    assert forced.returncode != 0
