"""What several test folders share: the parity kit and small threads."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

PARITY = Path(__file__).parent / "parity"


@pytest.fixture
def inductor() -> None:
    """Skip where torch.compile's default backend cannot work: it calls a C++ compiler, with paths unquoted."""
    if shutil.which("g++") is None or " " in sys.prefix:
        pytest.skip("needs g++, and an environment without a space in its path")


@pytest.fixture
def weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``weights/`` in place of the repository's."""
    folder = tmp_path / "repository" / "weights"
    folder.mkdir(parents=True)
    (folder / "README.md").touch()
    monkeypatch.setattr("model.zoo.places.ROOT", folder.parent)
    return folder


@pytest.fixture(scope="session")
def parity_fill() -> ModuleType:
    """The kit's `fill_` and `image`, which derive weights and inputs from names and seeds."""
    spec = importlib.util.spec_from_file_location("parity_fill", PARITY / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def parity_json():
    return lambda name: json.loads((PARITY / name).read_text())


@pytest.fixture(scope="session")
def parity_arrays():
    return lambda name: np.load(PARITY / name)
