"""Damaged LMDB files: the reader gives bytes and class indices or raises a ValueError; nothing leads it out of
the file, which would be a crash that no test survives.
"""

from __future__ import annotations

import pickle
import random

import lmdb
import pytest
from fuzzing import damaged, fuzzed, outcome
from hypothesis import given
from hypothesis import strategies as st

from data.lmdb_file import LmdbFile, write_lmdb

PAGE = 4096
NUM_RECORDS = 90


def records():
    draw = random.Random(0)
    for number in range(NUM_RECORDS):
        yield f"c{number % 3}/{number:03d}.png", draw.randbytes(draw.choice((50, 500, 3000, 9000))), number % 3


@pytest.fixture(params=[0, 1], ids=["LMDB 0.9", "LMDB 1.0"])
def contents(request, tmp_path):
    """Return a file's contents in either format of LMDB."""
    path = tmp_path / "whole.lmdb"
    if request.param == 0:
        write_lmdb(path, records(), class_names=["c0", "c1", "c2"])
        return path.read_bytes()
    try:
        environment = lmdb.open(str(path), subdir=False, map_size=1 << 22, lock=False, lib_version=1)
    except (TypeError, lmdb.Error) as error:
        pytest.skip(f"this lmdb lacks version 1.0 of the library ({error})")
    with environment, environment.begin(write=True) as transaction:
        keys = [f"{number:03d}".encode() for number in range(NUM_RECORDS)]
        for key, (_, data, label) in zip(keys, records(), strict=True):
            transaction.put(key, pickle.dumps((data, label)))
        transaction.put(b"__keys__", pickle.dumps(keys))
        transaction.put(b"__len__", pickle.dumps(len(keys)))
    return path.read_bytes()


@st.composite
def damaged_pages(draw: st.DrawFn, contents: bytes) -> bytes:
    """Return contents with flipped bits in a few pages, most of them near a page's start, where its entries begin."""
    spoiled = bytearray(contents)
    for _ in range(draw(st.integers(1, 6))):
        page = draw(st.one_of(st.integers(0, len(contents) // PAGE - 1), st.sampled_from((0, 1))))
        place = page * PAGE + draw(st.one_of(st.integers(0, 200), st.integers(0, PAGE - 1)))
        spoiled[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(spoiled)


def test_whole_file(contents, tmp_path):
    file = LmdbFile(tmp_path / "whole.lmdb")
    assert [file.record(index) for index in range(len(file))] == [(data, label) for _, data, label in records()]


def test_damaged_file(contents, tmp_path):
    path = tmp_path / "a.lmdb"

    @fuzzed
    @given(st.one_of(damaged_pages(contents), damaged(contents)))
    def check(spoiled: bytes) -> None:
        path.write_bytes(spoiled)
        file, refusal = outcome(lambda: LmdbFile(path))
        if file is None:
            assert str(path) in str(refusal)
            return
        for index in range(len(file)):
            record, refusal = outcome(lambda: file.record(index))  # noqa: B023 - called at once
            if record is None:
                assert str(path) in str(refusal)
            else:
                assert isinstance(record[0], bytes)
                assert record[1] >= 0
        file.close()

    check()
