"""What a report's figures depend on: the machine, the compiled kernels, the memory's rate."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import subprocess
from typing import Any

import torch

from model.lib_mamba import backends, info, library, trial

from ..common import REPOSITORY, describe_machine
from .context import COPY_CASE, Cases, Context

__all__ = ["environment", "sources"]

PACKAGES = ("torch", "triton", "timm", "numpy", "pillow", "torchvision")


def environment(context: Context) -> Cases:
    """Describe the machine, measure the rate of a copy, and check every backend of the scan that can run."""
    yield COPY_CASE, context.measure_copy
    yield {"what": "machine"}, functools.partial(_machine, context)
    yield {"what": "nvidia-smi"}, _nvidia_smi
    for name in backends.NAMES:
        if backends.serves(name, context.device):
            yield {"what": "backend", "backend": name}, functools.partial(_backend, context.device, name)


def _machine(context: Context) -> dict[str, Any]:
    built, problem = library.build_info()
    return {
        **describe_machine(context.device),
        "packages": {name: _version(name) for name in PACKAGES},
        "sources": sources(),
        "kernels": problem or built,
        "info": info.describe(),
    }


def sources() -> str:
    """Return a hash of the package's sources, which names a version where git does not."""
    digest = hashlib.sha256()
    folder = REPOSITORY / "model"
    for path in sorted(path for pattern in ("*.py", "*.cu", "*.cuh", "*.cpp", "*.h") for path in folder.rglob(pattern)):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _nvidia_smi() -> dict[str, Any]:
    """Return what nvidia-smi prints; why not, where it cannot run."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"problem": str(error)}
    return {"output": done.stdout + done.stderr}


def _backend(device: str, name: str) -> dict[str, Any]:
    """Try a backend as it is tried before it is chosen, and compare it with float64."""
    is_available, detail = backends.availability(name)
    if not is_available:
        return {"detail": detail, "passed": None}
    problem = trial.problem_of(backends._load(name), torch.device(device))
    errors = {} if problem else info.check(name, device)
    named = {str(dtype).removeprefix("torch."): max(pair) for dtype, pair in errors.items()}
    is_exact = all(max(pair) <= max(trial.TOLERANCES[dtype]) for dtype, pair in errors.items())
    return {"detail": problem or detail, "errors": named, "passed": not problem and is_exact}
