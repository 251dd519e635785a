"""The shipped config files: the twelve recipes against the published values, fine-tuning and the quickstart."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import load_config, to_dict

ROOT = Path(__file__).resolve().parents[2]
PARITY = json.loads((ROOT / "tests/parity/configs.json").read_text())
LEFTOVERS = ("ft", "tea_model", "trainer.scale_kwargs")  # entries that nothing reads
OURS = {"data.type": "DefaultCLS", "trainer.data.batch_size_per_gpu": 256}  # at four processes
CONFIG_FILES = sorted([ROOT / "configs/quickstart.py", *(ROOT / "configs/mobilemamba").glob("[!_]*.py")])


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        yield f"{path}.length", len(value)
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}")
    else:
        yield path, value


@pytest.mark.parametrize("name", sorted(PARITY))
def test_resolved_recipe_equals_the_published_one(name):
    config = load_config(f"configs/mobilemamba/{name}", world_size=4)
    ours = dict(leaves(to_dict(config)))
    expected = {path: value for path, value in leaves(PARITY[name]) if not path.startswith(LEFTOVERS)}
    expected |= OURS
    assert {path: ours.get(path, "absent") for path in expected} == expected


def test_parity_holds_the_twelve_recipes():
    names = {
        f"mobilemamba_{variant}{suffix}" for variant in ("t2", "t4", "s6", "b1", "b2", "b4") for suffix in ("", "s")
    }
    assert set(PARITY) == names == {file.stem for file in CONFIG_FILES} - {"finetune", "quickstart"}


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: file.stem)
def test_every_config_file_says_how_to_run_it(file):
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    commands = " ".join(docstring.replace("\\\n", " ").split())
    config = file.relative_to(ROOT).with_suffix("")
    if file.stem in PARITY:
        launch = "python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py"
        assert f"{launch} -c {config} -m train" in commands
        assert f"{launch} -c {config} -m test model.model_kwargs.checkpoint_path=weights/MobileMamba_" in commands
    else:
        assert f"python3 run.py -c {config} -m " in commands
    assert "top-1" in commands or "Accuracy" in commands


@pytest.mark.parametrize("name", sorted(PARITY))
def test_train_and_test_share_network_and_input(name):
    train = load_config(f"configs/mobilemamba/{name}", world_size=8)
    test = load_config(f"configs/mobilemamba/{name}.py", mode="test", world_size=8)
    assert test.model == train.model
    assert test.data == train.data


def test_each_load_gives_a_fresh_tree():
    first, second = (load_config("configs/mobilemamba/mobilemamba_t2s") for _ in range(2))
    assert first == second
    assert first.loss.loss_terms[1] is not second.loss.loss_terms[1]


def test_finetuning_starts_from_a_recipe_and_follows_the_class_count():
    assert load_config("configs/mobilemamba/finetune", mode="ft").nb_classes is None
    config = load_config("configs/mobilemamba/finetune", ["nb_classes=37"], mode="ft")
    assert (config.data.nb_classes, config.model.model_kwargs.num_classes) == (37, 37)
    assert (config.epoch_full, config.warmup_epochs, config.weight_decay) == (30, 5, 1e-8)
    assert config.optim.lr == pytest.approx(1.5e-3 * 256 / 512 / 6)


def test_quickstart_does_not_mirror_digits():
    config = load_config("configs/quickstart")
    (transform,) = config.data.train_transforms
    assert (transform.hflip, transform.vflip, transform.auto_augment) == (0.0, 0.0, None)
    assert transform.input_size == config.data.test_transforms[0].size == 64
    assert [term.type for term in config.loss.loss_terms] == ["LabelSmoothingCE"]
    assert config.trainer.scaler == "none"


def test_importing_configs_imports_nothing_heavy():
    code = (
        "import sys, configs; configs.load_config('configs/mobilemamba/mobilemamba_t2s'); "
        "print(sorted({'torch', 'timm', 'numpy', 'model', 'data', 'loss', 'util', 'trainer'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", PARITY)
def test_pretrained_means_the_recipes_own_checkpoint(name):
    config = load_config(f"configs/mobilemamba/{name}", mode="test")
    assert (config.model.released or config.model.name.lower()) == name
