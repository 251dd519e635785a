"""What is installed: one package, complete, that asks for what it imports and gives the released numbers."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARITY = ROOT / "tests" / "parity"
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "model")
BUILD = "import sys; from setuptools import build_meta; build_meta.{}(sys.argv[1])"
# Where a package is asked for, if not by everyone who installs ours.
IMPORTED_AS = {
    "yaml": "PyYAML",
    "fvcore": "train",
    "gdown": "zoo",
    "triton": "torch",
    "PIL": "pillow",
    "pillow_heif": "heic",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "nncf": "int8",
    "ncnn": "ncnn",
    "pnnx": "ncnn",
    "coremltools": "coreml",
    "litert_torch": "litert",
    "ai_edge_litert": "litert",
    "executorch": "executorch",
}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def build(kind: str, source: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD.format(f"build_{kind}"), target]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (archive,) = target.iterdir()
    return archive


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy to build in, as a build leaves its traces beside the sources."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("source")
    leave_out = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", "*.so", "build.json")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=leave_out)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist") / "dist")


def requirements(extra: str = "") -> set[str]:
    """Names in setup.py's lists, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    found = {}
    named = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            found[""] = node.value
        if isinstance(node, ast.Dict):
            found |= {key.value: value for key, value in zip(node.keys, node.values, strict=True) if key}
    lists = [found[extra], *(named[node.id] for node in ast.walk(found[extra]) if isinstance(node, ast.Name))]
    texts = [node.value for each in lists for node in ast.walk(each) if isinstance(node, ast.Constant)]
    return {re.match(r"[\w-]+", text)[0] for text in texts}


def test_wheel_holds_one_package_with_every_file(wheel, source):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(source / "model")) for path in (source / "model").rglob("*") if path.is_file()}
    assert {name.removeprefix("mobilemamba/") for name in names} == expected - {"README.md"}
    assert all(name.startswith("mobilemamba/") for name in names)


def test_sdist_builds_the_same_wheel(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert not (unpacked / "tests").exists()
    again = zipfile.ZipFile(build("wheel", unpacked, tmp_path / "dist"))
    first = zipfile.ZipFile(wheel)
    for name in first.namelist():
        assert name.endswith("RECORD") or again.read(name) == first.read(name), name
    assert len(again.namelist()) == len(first.namelist())


def test_wheel_says_what_it_is(wheel):
    import model

    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = archive.read(name).decode()
    assert f"\nVersion: {model.__version__}\n" in metadata
    for extra in (
        "lmdb",
        "heic",
        "downstream",
        "export",
        "onnx",
        "openvino",
        "int8",
        "ncnn",
        "coreml",
        "litert",
        "executorch",
        "dev",
        "train",
        "zoo",
    ):
        assert f"\nProvides-Extra: {extra}\n" in metadata


def as_modules(names: set[str]) -> set[str]:
    """Return what most distributions of these names are imported as."""
    return {name.replace("-", "_") for name in names}


def test_what_is_imported_is_asked_for():
    required = requirements()
    for path in (ROOT / "model").rglob("*.py"):
        if "selective_scan" in path.relative_to(ROOT).parts:
            continue  # a package of its own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names):
                elsewhere = IMPORTED_AS.get(name)
                asked_for = (
                    name in required or elsewhere in required or name in as_modules(requirements(elsewhere or ""))
                )
                assert asked_for, f"{path.relative_to(ROOT)} imports {name}, which setup.py does not ask for"


def test_development_needs_are_those_of_the_requirements_file():
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.match(r"[\w-]+", line)[0] for line in lines if line and line[0] not in "#-"}
    assert pinned <= requirements("dev")


def closure(names: set[str]) -> set[str]:
    """Return distributions and all that they need, of those installed here."""
    done: set[str] = set()
    while names:
        name = names.pop()
        done.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        names |= {re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need} - done
    return done


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel and links to what it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=120)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True, timeout=120)
    links = folder / "links"
    links.mkdir()
    for name in closure(requirements()):
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for part in {file.parts[0] for file in files if file.parts[0] != ".."}:
            target = Path(importlib.metadata.distribution(name).locate_file(part))
            if target.exists() and not (links / part).exists():
                (links / part).symlink_to(target)
    (site,) = (folder / "venv" / "lib").glob("*/site-packages")
    (site / "links.pth").write_text(f"{links}\n")
    return python


PARITY_FROM_THE_WHEEL = """
import importlib.util, json, sys
from pathlib import Path
import numpy as np
import torch
import mobilemamba

root, parity = Path(sys.argv[1]), Path(sys.argv[2])
assert not Path(mobilemamba.__file__).is_relative_to(root)
spec = importlib.util.spec_from_file_location("parity_fill", parity / "fill.py")
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)
shapes = json.loads((parity / "state_dict.json").read_text())
for name in mobilemamba.list_models():
    own = {key: list(value.shape) for key, value in mobilemamba.create_model(name).state_dict().items()}
    assert own == shapes["MobileMamba_B1" if name[-2:] in ("B2", "B4") else name], name
arrays = np.load(parity / "model_eval.npz")
for case in ("T2_1x160x224_seed1", "B1_1x256x256_seed0"):
    variant, shape, seed = case.split("_")
    images = kit.image(*map(int, shape.split("x")), int(seed.removeprefix("seed")))
    network = kit.fill_(mobilemamba.create_model(f"MobileMamba_{variant}")).eval()
    for _ in ("plain", "folded"):
        with torch.no_grad():
            logits = network(images)
        expected = torch.from_numpy(arrays[f"{case}_logits"])
        assert (logits - expected).abs().max() < 2e-5 * expected.abs().max(), case
        network.fuse()
for absent in ("lmdb", "sklearn", "fvcore", "tensorboardX", "matplotlib", "pytest"):
    assert importlib.util.find_spec(absent) is None, absent
print("as released")
"""


@pytest.mark.slow
def test_installed_wheel_gives_the_released_numbers(clean_python, tmp_path):
    command = [clean_python, "-I", "-c", PARITY_FROM_THE_WHEEL, ROOT, PARITY]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("as released\n")


@pytest.mark.slow
def test_installed_commands_run(clean_python, tmp_path):
    for module in ("mobilemamba.convert", "mobilemamba.lib_mamba.info"):
        command = [clean_python, "-I", "-m", module, *(["--help"] if module.endswith("convert") else [])]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
    assert "reference" in result.stdout
