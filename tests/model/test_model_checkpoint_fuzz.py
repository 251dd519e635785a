"""Damaged checkpoint files: whatever a bit flip, a cut or foreign bytes do, the reader only raises a ValueError."""

from __future__ import annotations

import argparse
import copy
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_cases import Net, same
from fuzzing import damaged, fuzzed, no_hang
from hypothesis import given

from model.checkpoint import load_checkpoint, read_checkpoint

CONTENTS = {
    "net": Net().state_dict(),
    "epoch": 3,
    "scores": [np.float64(71.5), None, True],
    "args": argparse.Namespace(lr=0.1, name="t2"),
}


def torch_file(*, zipped: bool, checked: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.serialization.set_crc32_options(checked)
    try:
        torch.save(CONTENTS, buffer, _use_new_zipfile_serialization=zipped)
    finally:
        torch.serialization.set_crc32_options(True)
    return buffer.getvalue()


FILES = {
    "zip.pth": torch_file(zipped=True),
    "unchecked.pth": torch_file(zipped=True, checked=False),
    "legacy.pth": torch_file(zipped=False),
    "file.safetensors": safetensors.torch.save(CONTENTS["net"]),
}


def refusal(network: Net, path: Path, *, mmap: bool) -> str | None:
    """Load a file; return the message of the ValueError if there is one."""
    try:
        load_checkpoint(network, path, checkpoint=read_checkpoint(path, mmap=mmap))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
def test_damaged_file(tmp_path_factory, name, mmap):
    folder = tmp_path_factory.mktemp("damaged")
    network = Net()

    @fuzzed
    @given(damaged(FILES[name]))
    def check(contents: bytes) -> None:
        path = folder / name
        path.write_bytes(contents)
        before = copy.deepcopy(network.state_dict())
        with no_hang():
            message = refusal(network, path, mmap=mmap)
        assert message is None or (str(path) in message and same(network.state_dict(), before))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check()
