"""A command reads its checkpoint once, mapped into memory, and still takes from it all that it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainer_cases import CLASSES, CONFIG, TINY_NETWORK

import trainer
from configs import load_config
from model import create_model
from trainer import Predictor, build_run
from trainer.network import count_head_classes
from util.distributed import Process


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Plain and averaged weights of three classes."""
    networks = {
        name: create_model(TINY_NETWORK[0].removeprefix("model.name="), num_classes=3) for name in ("net", "net_E")
    }
    weights = {name: network.state_dict() for name, network in networks.items()}
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save({**weights, "class_names": list(CLASSES)}, path)
    return path


@pytest.fixture
def reads(monkeypatch) -> list[tuple[Path, bool]]:
    """Every file that is read from here on, and whether it is mapped."""
    seen = []
    load = torch.load

    def noting(file, *args, mmap=False, **kwargs):
        seen.append((Path(file), mmap))
        return load(file, *args, mmap=mmap, **kwargs)

    monkeypatch.setattr(torch, "load", noting)
    return seen


@pytest.mark.parametrize("classes", ["nb_classes=3", "nb_classes=None"])
@pytest.mark.parametrize("mode", ["test", "test_net", "predict", "ft"])
def test_a_command_reads_its_checkpoint_once(overrides, class_folders, checkpoint, reads, mode, classes):
    more = [*TINY_NETWORK, classes, f"model.model_kwargs.checkpoint_path={checkpoint}"]
    more += [f"predict.input={class_folders / 'val'}"] if mode == "predict" else []
    config = load_config(CONFIG, overrides(*more), mode=mode)
    if mode == "ft":
        network = build_run(config, Process()).network
        assert network.num_classes == 3
    elif mode == "predict":
        predictor = Predictor(config, Process())
        assert predictor.run() == 0
        assert predictor.names.words == list(CLASSES)
    else:
        tester = trainer.Tester(config, Process())
        assert tester.run() == 0
        assert list(tester.scores) == (["net", "net_E"] if mode == "test" else ["net"])
    assert reads == [(checkpoint, True)]


def test_a_resume_reads_the_latest_checkpoint_once(finish, build, reads):
    run, _ = finish()
    reads.clear()
    build(f"trainer.resume_dir={run.folder}")
    assert [path for path, _ in reads] == [run.folder / "latest_ckpt.pth"]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("MobileMamba_T2", "head.l"),
        ("mobilemamba_b4", "head.l"),
        ("timm_resnet18", "fc"),
        ("timm_levit_128", "head_dist.linear"),
        ("tresnet_l_v2", "head.fc"),
    ],
)
def test_classes_are_counted_without_a_network(name, head):
    config = load_config(CONFIG, [f"model.name={name}"], mode="predict")
    weights = {"stem.weight": torch.zeros(5, 3), f"{head}.weight": torch.zeros(7, 2)}
    assert count_head_classes(config, {"net": weights}) == 7
    assert count_head_classes(config, None) == 1000  # of the pretrained weights


def test_an_unknown_network_is_named_with_the_nearest(class_folders):
    more = ["model.name=timm_resnt18", "model.model_kwargs.pretrained=true", f"predict.input={class_folders / 'val'}"]
    with pytest.raises(ValueError, match="no model 'resnt18'; the nearest is timm_resnet18"):
        Predictor(load_config(CONFIG, ["trainer.device=cpu", *more], mode="predict"), Process())
