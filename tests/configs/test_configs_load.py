"""Config files: where they are found, what faulty ones are told, the read-only result and its saved form."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import yaml

from configs import load_config, save_config, to_dict
from configs.schema import Config, TrainerData

T2 = "configs/mobilemamba/mobilemamba_t2"
T2S = "configs/mobilemamba/mobilemamba_t2s"


def write(folder, body, name="own.py"):
    file = folder / name
    file.write_text(f"from configs.schema import *\n\n\ndef get_config():\n    {body}\n")
    return file


class TestFinding:
    @pytest.mark.parametrize("path", [T2, f"{T2}.py"])
    def test_relative_to_the_repository_from_anywhere(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert load_config(path).model.name == "MobileMamba_T2"

    def test_relative_to_the_working_directory_first(self, tmp_path, monkeypatch):
        (tmp_path / "configs/mobilemamba").mkdir(parents=True)
        write(tmp_path / "configs/mobilemamba", "return Config(size=64)", "mobilemamba_t2.py")
        monkeypatch.chdir(tmp_path)
        assert load_config(T2).size == 64

    def test_a_name_with_a_dot_needs_no_suffix(self, tmp_path):
        write(tmp_path, "return Config(size=96)", "lr0.1.py")
        assert load_config(tmp_path / "lr0.1").size == 96

    @pytest.mark.parametrize(
        ("path", "meant"),
        [
            ("configs/mobilemamba/mobilemamba_t22", "configs/mobilemamba/mobilemamba_t2"),
            ("configs/mobilemamba/mobilmamba_b1s.py", "configs/mobilemamba/mobilemamba_b1s"),
            ("mobilemamba_s6", "configs/mobilemamba/mobilemamba_s6"),
            ("configs/quikstart", "configs/quickstart"),
        ],
    )
    def test_missing_file_names_the_nearest(self, path, meant):
        with pytest.raises(ValueError, match=f"{path}: .*did you mean '{meant}'"):
            load_config(path)

    def test_missing_file_beside_own_configs(self, tmp_path):
        write(tmp_path, "return Config()", "flowers.py")
        with pytest.raises(ValueError, match=f"did you mean '{tmp_path}/flowers'"):
            load_config(tmp_path / "flower")


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("return Config(sise=64)", ["sise"]),
        ("config = Config()\n    config.trainer.epoch_ful = 3\n    return config", ["epoch_ful", "'epoch_full'"]),
        ("return Config(size='small')", ["size='small'", "an integer"]),
        ("config = Config()\n    config.trainer.ema = 2\n    return config", ["trainer.ema=2", "< 1"]),
        ("config = Config()\n    config.trainer = 3\n    return config", ["trainer=3", "Trainer"]),
        ("return {}", ["dict", "Config"]),
        ("return undefined", ["NameError", "undefined"]),
        ("return (", ["SyntaxError"]),
    ],
)
def test_faulty_file_is_named(body, parts, tmp_path):
    file = write(tmp_path, body)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the parts of the message are checked below
        load_config(file)
    assert all(part in str(error.value) for part in [str(file), *parts]), error.value


def test_file_without_get_config_is_named(tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("size = 3\n")
    with pytest.raises(ValueError, match=r"empty\.py: .*get_config"):
        load_config(file)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"mode='tset'.*did you mean 'test'"):
        load_config(T2, mode="tset")


class TestReadOnly:
    def test_entries_refuse_assignment(self):
        config = load_config(T2S, ["optim.optim_kwargs.extra.foreach=True"])
        for node in (config, config.trainer.data, config.data.train_transforms[0], config.loss.loss_terms[1].cfg):
            name = dataclasses.fields(node)[0].name
            with pytest.raises(AttributeError, match=f"{name} cannot be assigned: .*read-only"):
                setattr(node, name, "changed")
        with pytest.raises(TypeError):
            config.loss.loss_terms[0] = None
        with pytest.raises(TypeError, match="read-only"):
            config.optim.optim_kwargs.extra["foreach"] = False
        with pytest.raises(AttributeError):
            del config.size

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
    def test_copies_are_equal_and_read_only(self, copied):
        config = load_config(T2S, ["optim.optim_kwargs.extra.foreach=True"])
        other = copied(config)
        assert other == config
        with pytest.raises(AttributeError, match="read-only"):
            other.trainer.epoch_full = 1
        with pytest.raises(TypeError, match="read-only"):
            other.optim.optim_kwargs.extra.update(foreach=False)

    def test_replace_gives_an_open_node(self):
        config = load_config(T2)
        node = dataclasses.replace(config.trainer.data, num_workers_per_gpu=0)
        node.drop_last = False
        assert isinstance(node, TrainerData)
        assert (node.num_workers_per_gpu, config.trainer.data.num_workers_per_gpu) == (0, 8)


class TestSaving:
    OVERRIDES = ("loss.clip_grad=None", "trainer.mixup_kwargs.prob=0", "model.model_kwargs.extra={'a': [1, 2]}")

    def test_saved_file_gives_the_same_tree(self, tmp_path):
        config = load_config(T2S, self.OVERRIDES, world_size=2)
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml", world_size=2) == config

    def test_plain_form_is_plain(self):
        plain = to_dict(load_config(T2S, self.OVERRIDES))
        assert yaml.safe_load(yaml.safe_dump(plain)) == plain
        assert plain["loss"]["loss_terms"][1]["cfg"]["name"] == "tresnet_l_v2"
        assert plain["model"]["model_kwargs"]["extra"] == {"a": [1, 2]}

    def test_what_follows_follows_anew(self, tmp_path):
        save_config(load_config(T2, ["weight_decay=0.1"], world_size=8), tmp_path / "config.yaml")
        config = load_config(tmp_path / "config.yaml", ["size=256", "batch_size=512"], world_size=2)
        assert config.data.train_transforms[0].input_size == 256
        assert config.trainer.data.batch_size_per_gpu == 256
        assert config.optim.lr == pytest.approx(1.5e-3)
        assert config.optim.optim_kwargs.weight_decay == 0.1
        assert load_config(tmp_path / "config.yaml", mode="test", world_size=3).mode == "test"

    def test_finetuning_is_restored_with_its_overrides(self, tmp_path):
        config = load_config(T2, ["epoch_full=3"], mode="ft")
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml", mode="ft") == config

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("trainer: {epoch_ful: 3}", r"trainer\.epoch_ful: .*'trainer\.epoch_full'"),
            ("size: small", "size='small'"),
            ("[1, 2]", "holds a list"),
            ("a: [", "not YAML"),
            ("derived: [sise]", "sise"),
        ],
    )
    def test_faulty_saved_file_is_named(self, text, message, tmp_path):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        with pytest.raises(ValueError, match=f"config.yaml: .*{message}"):
            load_config(file)

    def test_hand_written_exponents_are_numbers(self, tmp_path):
        file = tmp_path / "config.yaml"
        file.write_text("lr: 1e-3\n")
        assert load_config(file).optim.lr == pytest.approx(2e-3)


def test_default_tree_is_open():
    config = Config()
    config.size = 64
    config.loss.loss_terms.append(config.loss.loss_terms[0])
    assert (config.size, len(config.loss.loss_terms)) == (64, 2)
