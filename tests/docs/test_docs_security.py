"""Every line of the threat model names tests, and these exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_threat_names_tests_that_exist():
    rows = [line for line in (ROOT / "docs" / "security.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        file = ""
        named = re.findall(r"`([\w/]*(?:\.py)?)::(\w+)`", row)
        assert named, row
        for place, test in named:
            file = place or file
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
