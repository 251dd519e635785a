"""Fixtures of several test folders: the parity kit, weights' folders, logs, threads, a browser."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from browser import open_browser

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


@pytest.fixture(autouse=True)
def own_log():
    """Begin with the log of a new process, whatever came before; remove what the test leaves, such as a log file."""
    root = logging.getLogger()
    logging.disable(logging.NOTSET)
    root.setLevel(logging.WARNING)
    root.filters.clear()
    before = list(root.handlers)
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="module")
def one_thread():
    """Keep small networks from waiting for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium; tests that ask for one are skipped where there is none."""
    opened = open_browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.driver.quit()
