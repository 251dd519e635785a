"""A checkpoint, a server that has it, and the place where its file belongs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from file_server import serving
from zoo_cases import NAME, REMOTE, released_weights

from model.zoo import find


@pytest.fixture(scope="module")
def contents() -> bytes:
    """A whole checkpoint of T2."""
    file = io.BytesIO()
    torch.save({"net": released_weights(find(NAME))}, file)
    return file.getvalue()


@pytest.fixture
def server(contents, monkeypatch):
    monkeypatch.setattr("model.zoo.transfer.PAUSE_SECONDS", 0.001)
    with serving() as running:
        running.files[REMOTE] = contents
        yield running


@pytest.fixture
def file(weights_folder) -> Path:
    """Where the checkpoint belongs."""
    return weights_folder / REMOTE
