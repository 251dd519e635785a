"""The floors of lib_mamba in model/README.md: every file stands on one, and imports only from those below."""

from __future__ import annotations

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "model" / "lib_mamba"


def floors():
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    drawing = next(block for block in re.findall(r"```\n(.*?)```", text, flags=re.S) if "\nlibrary.py" in block)
    return [re.findall(r"^(\S+\.py)", floor, flags=re.M) for floor in drawing.split("▼")]


def imported_files(path):
    """Files of lib_mamba that a file of it imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (path.parent / f"{name.replace('.', '/')}.py" for name in names)


def test_each_file_imports_only_from_below():
    height = {FOLDER / name: -index for index, names in enumerate(floors()) for name in names}
    assert {path for path in height if path.parent == FOLDER} == set(FOLDER.glob("*.py")) - {FOLDER / "__init__.py"}
    for path in height:
        above = {other.name for other in imported_files(path) if other in height and height[other] >= height[path]}
        assert not above, f"{path.name} imports {above}"
