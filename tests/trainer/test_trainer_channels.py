"""Gray images and images with transparency, from training to prediction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F
from trainer_cases import CLASSES, CONFIG, TINY_NETWORK, short_run

import trainer
from configs import load_config
from model import create_model
from trainer import Predictor, build_run
from trainer.checkpoint import load_training_checkpoint
from trainer.train import train
from util.distributed import Process

SIZE = 32
MEAN, STD = (0.4, 0.5, 0.6, 0.7), (0.2, 0.3, 0.4, 0.5)


@pytest.fixture(params=["L", "RGBA"])
def folders(request, tmp_path):
    """Return the mode of images, and class folders of them."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for level, name in enumerate(CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = draw.integers(60 * level, 60 * level + 120, (36, 40, 4), dtype=np.uint8)
                image = Image.fromarray(pixels[..., 0] if request.param == "L" else pixels)
                image.save(tmp_path / split / name / f"{index}.png")
    return request.param, tmp_path


def plain_logits(network: torch.nn.Module, image: Image.Image) -> torch.Tensor:
    channels = len(image.getbands())
    resized = F.resize(image, int(SIZE / 0.875), F.InterpolationMode.BICUBIC)
    tensor = F.to_tensor(F.center_crop(resized, SIZE))
    with torch.no_grad():
        return network(F.normalize(tensor, MEAN[:channels], STD[:channels])[None])


def test_train_test_and_predict(folders, tmp_path):
    mode, data = folders
    channels = {"L": 1, "RGBA": 4}[mode]
    norms = [
        f"data.{place}.{name}={list(values[:channels])}"
        for place in ("train_transforms.0", "test_transforms.3")
        for name, values in (("mean", MEAN), ("std", STD))
    ]
    more = [f"data.channels={channels}", "batch_size=4", "epoch_full=1", *norms]
    more += ["data.train_transforms.0.auto_augment=None"] if mode == "RGBA" else []
    arguments = short_run(data, tmp_path / "runs", *TINY_NETWORK, *more)
    run = build_run(load_config(CONFIG, arguments), Process())
    assert train(run) == 0

    network = create_model("timm_mobilenetv3_small_050", num_classes=3, in_chans=channels, drop_rate=0.2).eval()
    network.load_state_dict(load_training_checkpoint(run.folder / "latest_ckpt.pth")["net"])
    expected = {path: plain_logits(network, Image.open(path)) for path in sorted((data / "val").rglob("*.png"))}
    hits = sum(int(logits.argmax() == CLASSES.index(path.parent.name)) for path, logits in expected.items())

    weights = f"model.model_kwargs.checkpoint_path={run.folder / 'latest_ckpt.pth'}"
    tester = trainer.Tester(load_config(run.folder / "config.yaml", [weights], mode="test_net"), Process())
    assert tester.run() == 0
    assert (tester.scores["net"].top1_count, tester.scores["net"].num_images) == (hits, 12)

    overrides = [weights, f"predict.input={data / 'val'}", f"predict.sheet={tmp_path / 'sheet.png'}"]
    predictor = Predictor(load_config(run.folder / "config.yaml", overrides, mode="predict"), Process())
    assert predictor.run() == 0
    for (path, logits), prediction in zip(expected.items(), predictor.predictions, strict=True):
        assert prediction.path == str(path)
        shares = {entry.index: entry.probability for entry in prediction.classes}
        np.testing.assert_allclose([shares[index] for index in range(3)], logits.softmax(1)[0], atol=1e-5)
    assert Image.open(tmp_path / "sheet.png").mode == "RGB"
