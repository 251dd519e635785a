"""The repository as a whole: the direction of imports, and what the README promises."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"configs", "model", "util", "loss", "optim", "data", "trainer", "run", "downstream", "benchmarks", "weights"}
ALLOWED = {
    "configs": set(),
    "model": set(),
    "util": set(),
    "loss": {"configs", "model", "util"},
    "optim": {"configs", "model", "util"},
    "data": {"configs", "model", "util"},
    "trainer": {"configs", "model", "util", "loss", "optim", "data"},
    "run": {"configs", "util", "trainer"},
    "hubconf": {"model"},
    "downstream": {"model", "util"},
    "benchmarks": {"model", "util", "configs", "data"},
    "weights": {"configs", "model", "util", "data", "trainer", "downstream"},
}


def sources(folder):
    file = ROOT / f"{folder}.py"
    return [file] if file.is_file() else sorted((ROOT / folder).rglob("*.py"))


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[: -node.level]
            assert above, f"{path}: a relative import leaves the repository"


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder):
    for path in sources(folder):
        wrong = (set(imported_packages(path)) & OURS) - ALLOWED[folder] - {folder}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
        if folder == "model":
            assert folder not in set(imported_packages(path)), f"{path}: model imports itself relatively only"


def modules():
    """Every module of the repository, by its dotted name."""
    files = (path for folder in ALLOWED for path in sources(folder))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported_modules(name, path, known):
    """Yield the modules that a file imports, anywhere in it, `import_module` with a constant included."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (full if full in known else base for full in names if full in known or base in known)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            target = getattr(node.args[0], "value", None)
            if isinstance(target, str) and f"{package}{target}" in known:
                yield f"{package}{target}"


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    graph = {name: set(imported_modules(name, path, known)) - {name} for name, path in known.items()}
    assert graph["trainer"], "the graph is empty"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_run_py_is_short():
    assert len((ROOT / "run.py").read_text().splitlines()) <= 40


def prose(document):
    return re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)


def anchors(document):
    """The names under which GitHub links to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tree_of(readme):
    """Path and description of every entry of the README's tree."""
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", readme, flags=re.S)[1]
    folders = []
    for line in tree.splitlines():
        indent, names, description = re.fullmatch(r"( *)(\S.*?)(?:  +(.*))?", line).groups()
        folders = folders[: len(indent) // 2]
        for name in names.split(", "):
            yield "/".join([*folders, name.rstrip("/")]), description or ""
        folders.append(names.rstrip("/"))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_readme_has_the_published_figures_and_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    published = json.loads((ROOT / "tests" / "parity" / "published.json").read_text())["imagenet"]
    launch = "python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py"
    train, test = re.findall(r"<details>.*?</details>", readme, flags=re.S)
    for entry in published.values():
        assert f"\n{launch} -c {entry['config']} -m train\n" in train
        assert f"\n{launch} -c {entry['config']} -m test model.model_kwargs.checkpoint_path={entry['path']}\n" in test
        assert f"{entry['top1']:.3f}" in readme
        assert f"{entry['top5']:.3f}" in readme
        assert entry["drive_id"] in readme
        assert (ROOT / f"{entry['config']}.py").is_file()


def test_downstream_readme_has_the_published_figures():
    readme = (ROOT / "downstream" / "README.md").read_text(encoding="utf-8")
    published = json.loads((ROOT / "tests" / "parity" / "published.json").read_text())
    for entry in published["downstream"].values():
        (row,) = (line for line in readme.splitlines() if entry["drive_id"] in line)
        box_or_map = [f"{value:.1f}" for name, value in entry["metrics"].items() if not name.startswith("segm")]
        assert f"| {' | '.join(box_or_map)} |" in row
        masks = [f"{value:.1f}" for name, value in entry["metrics"].items() if name.startswith("segm")]
        assert " | ".join(masks) in readme
        assert f"]({entry['config'].removeprefix('downstream/')})" in row


def test_readme_tree_exists():
    for path, description in tree_of((ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path
        folder = ROOT / path if (ROOT / path).is_dir() else (ROOT / path).parent
        for name in re.findall(r"[\w/]+\.py", description):
            assert (folder / name).is_file(), f"{path}: {name}"


def test_links_lead_somewhere():
    own = [folder for folder in ALLOWED if (ROOT / folder).is_dir()]
    for document in [
        *ROOT.glob("*.md"),
        *(path for name in [*own, "docs", "tests"] for path in (ROOT / name).rglob("*.md")),
    ]:
        for path, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", prose(document)):
            target = document.parent / path if path else document
            assert target.exists(), f"{document.relative_to(ROOT)} links to {path}"
            if anchor:
                assert anchor in anchors(target), f"{document.relative_to(ROOT)} links to {path}#{anchor}"


@pytest.mark.parametrize("name", ["README.md", "docs/library.md"])
def test_python_snippets_run(tmp_path, name):
    """One after the other, as a reader would, from a folder in which they may write."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.S)
    assert snippets
    command = [sys.executable, "-c", "\n".join(snippets)]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=300)
