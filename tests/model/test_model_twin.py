"""The code under both of its names in one process: operators and entry points registered once, equal answers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BOTH = """
import importlib, sys
import timm, torch

first, second = (importlib.import_module(name) for name in sys.argv[1:])
packages = (first, second)
assert first.MobileMamba is not second.MobileMamba
assert first.gated_scan is second.gated_scan
assert first.lib_mamba.backends is second.lib_mamba.backends
assert type(timm.create_model("mobilemamba_t2")) is first.MobileMamba

second.set_backend("reference")
assert first.lib_mamba.choose("cpu").name == "reference"

torch.manual_seed(0)
layers = [package.SS2D(16) for package in packages]
layers[1].load_state_dict(layers[0].state_dict())
images = torch.randn(2, 16, 5, 4)
results = []
for layer in layers:
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        y = run(images)
        y.square().sum().backward()
        results.append([y, *(value.grad for value in layer.parameters())])
for one, other in ((0, 2), (1, 3)):
    assert all(torch.equal(x, y) for x, y in zip(results[one], results[other], strict=True))

networks = [package.create_model("mobilemamba_t2", num_classes=3).eval() for package in packages]
networks[1].load_state_dict(networks[0].state_dict())
images = torch.randn(2, 3, 64, 64)
assert torch.equal(networks[0](images), networks[1](images))
for package in packages:
    folded = package.create_model("mobilemamba_t2").fuse().patch_embed
    assert type(folded).__module__ == f"{package.__name__}.mobilemamba.folded_layers"
"""


@pytest.fixture
def installed(tmp_path):
    """A folder that holds this code under the name that it is installed by."""
    shutil.copytree(ROOT / "model", tmp_path / "mobilemamba", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(script, installed, *arguments):
    # timm gives a UserWarning where an entry point is registered a second time.
    command = [sys.executable, "-W", "error::UserWarning:timm", "-W", "error:Overwriting", "-c", script, *arguments]
    environment = {"PYTHONPATH": f"{installed}:{ROOT}", "PATH": "/usr/bin:/bin", "HOME": str(installed)}
    return subprocess.run(command, env=environment, cwd=installed, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("order", [("model", "mobilemamba"), ("mobilemamba", "model")], ids=" then ".join)
def test_both_names_in_one_process(installed, order):
    result = run(BOTH, installed, *order)
    assert result.returncode == 0, result.stderr


def test_another_version_is_refused_and_both_are_named(installed):
    version = installed / "mobilemamba" / "version.py"
    version.write_text('__version__ = "9.9.9"\n')
    result = run("import mobilemamba, model", installed)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: model")
    assert f"mobilemamba 9.9.9 ({installed / 'mobilemamba'})" in message


def test_a_package_of_someone_else_may_be_called_model(installed, tmp_path):
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    (other / "model" / "__init__.py").write_text("version = None\n")
    result = run("import sys; sys.path.insert(0, sys.argv[1]); import model, mobilemamba", installed, str(other))
    assert result.returncode == 0, result.stderr
