"""Damaged list files: each gives the images and classes that its lines name, or a ValueError that names it."""

from __future__ import annotations

import contextlib
import re

from fuzzing import damaged, fuzzed, outcome
from hypothesis import example, given
from hypothesis import strategies as st

from data.folders import DefaultCLS
from data.images import UnreadableImageError

LINES = [f"{name}/{number}.png {label}" for label, name in enumerate(("ant", "bee")) for number in range(3)]
LIST = "\r\n".join([*LINES, "", "bee/3 with spaces.png\t1"]).encode()

names = st.one_of(st.sampled_from([line.rpartition(" ")[0] for line in LINES]), st.text(max_size=12))
labels = st.one_of(
    st.integers(-2, 3).map(str), st.integers().map(str), st.text(max_size=4), st.sampled_from(("1e3", "٣", "9" * 5000))
)
lines = st.lists(st.builds("{}{}{}".format, names, st.sampled_from(" \t\n\0"), labels), max_size=5)
texts = lines.map("\n".join).map(lambda text: text.encode(errors="surrogatepass"))


def test_damaged_list(make_folders, tmp_path):
    root = make_folders({"train": {"ant": 1, "bee": 1}})
    for line in LINES:
        (root / line.rpartition(" ")[0]).parent.mkdir(exist_ok=True)
        (root / line.rpartition(" ")[0]).touch()

    @fuzzed
    @given(st.one_of(damaged(LIST), texts, st.binary(max_size=60)), st.sampled_from(("train", "val")))
    @example(b"ant/0.png 0\nant/" + b"x" * 300 + b".png 0\n", "train")
    @example(b"x" * 300 + b".png 0\n", "train")
    @example(b"ant/\0.png 0\n", "train")
    @example(b"\xef\xbb\xbfant/0.png 0\x1c\n", "train")
    def check(contents: bytes, split: str) -> None:
        source = root / f"{split}.txt"
        source.write_bytes(contents)
        dataset, refusal = outcome(lambda: DefaultCLS(root, split=split))
        source.unlink()
        if dataset is None:
            assert str(source) in str(refusal)
            assert "\n" not in str(refusal)
        else:
            text = contents.decode("utf-8-sig", "surrogateescape")
            rows = [row.strip() for row in re.split("\r\n|\r|\n", text) if row.strip()]
            assert len(dataset) == len(rows)
            assert all(row.endswith(str(label)) for row, label in zip(rows, dataset.labels, strict=True))
            assert len(dataset.class_names) >= max(dataset.labels) + 1
            for index in range(len(dataset)):
                with contextlib.suppress(UnreadableImageError):
                    assert dataset.read_bytes(index) == b""

    check()
