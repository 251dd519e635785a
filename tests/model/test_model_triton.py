"""The Triton kernels without a GPU: the backends' tests, with Triton's interpreter, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The interpreter is slow: short sequences, odd numbers of channels, strided views.
FILE = "tests/model/test_model_scan_backends.py"
CASES = [
    *(
        f"test_output_and_every_gradient_against_float64[triton-{case}]"
        for case in ("1-float32", "9-float32", "16-bfloat16")
    ),
    "test_any_number_of_channels[triton-2-70-5]",
    "test_both_sequences_may_be_views[triton]",
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_output_and_every_gradient_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(f"{FILE}::{case}" for case in CASES)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{len(CASES)} passed" in done.stdout
