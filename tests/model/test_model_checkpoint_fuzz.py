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
from fuzzing import fuzzed
from hypothesis import given
from hypothesis import strategies as st

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


@st.composite
def damaged(draw: st.DrawFn, contents: bytes) -> bytes:
    """Return contents with flipped bits, foreign bytes in place of some, a cut at either end, or all of these."""
    spoiled = bytearray(contents)
    # Half of the places lie in the first bytes, where what says how to read the rest stands.
    place = st.one_of(st.integers(0, min(3000, len(contents) - 1)), st.integers(0, len(contents) - 1))
    for where in draw(st.lists(place, max_size=6)):
        spoiled[where] ^= 1 << draw(st.integers(0, 7))
    where, foreign = draw(place), draw(st.binary(max_size=12))
    spoiled[where : where + len(foreign)] = foreign
    start = draw(st.sampled_from((0, 0, 0, 1, 64)))
    return bytes(spoiled[start : draw(st.one_of(st.just(len(spoiled)), st.integers(0, len(spoiled))))])


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
        message = refusal(network, path, mmap=mmap)
        assert message is None or (str(path) in message and same(network.state_dict(), before))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check()
