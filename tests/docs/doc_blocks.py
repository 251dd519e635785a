"""The blocks of code of a guide in docs/, and how they are run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[\w :.]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", flags=re.S)
RUNNERS = {"python": [sys.executable, "-"], "bash": ["bash", "-euo", "pipefail", "-s"]}


class Block(NamedTuple):
    mark: str
    language: str
    code: str


def blocks_of(name: str) -> list[Block]:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return [Block(found["mark"] or "", found["language"], found["code"]) for found in BLOCK.finditer(text)]


def play(folder: Path, block: Block, environment: Mapping[str, str], *, timeout: float) -> str:
    """Run a block in a folder, with this interpreter first on the path; return what it prints."""
    done = subprocess.run(
        RUNNERS[block.language],
        input=block.code,
        cwd=folder,
        env={
            **environment,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",  # threads of several processes would wait for each other
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"
    return done.stdout
