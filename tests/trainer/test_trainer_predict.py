"""Mode predict, on screen and in files, against a plain loop over the same network."""

from __future__ import annotations

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F
from trainer_cases import CONFIG, TINY_NETWORK, short_run

from configs import load_config
from model import create_model
from trainer import Predictor, build_run
from trainer.checkpoint import load_training_checkpoint
from trainer.contact_sheet import GAP, INNER_GAP, LINE, SIDE
from trainer.train import train
from util.distributed import Process
from util.errors import RunError
from util.logging import setup_console

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 32


@pytest.fixture(scope="module")
def trained(class_folders, tmp_path_factory):
    """The folder of a run on three classes, whose network has learned their colours."""
    longer = ("epoch_full=6", "optim.lr=5e-3", "trainer.mixup_kwargs.prob=0", "nb_classes=None")
    arguments = short_run(class_folders, tmp_path_factory.mktemp("runs"), *TINY_NETWORK, *longer)
    run = build_run(load_config(CONFIG, arguments), Process())
    assert train(run) == 0
    return run.folder


@pytest.fixture
def predict(trained):
    """Predict with the run's own configuration; return the predictor, which has run."""

    def do(place, *more: str, checkpoint="net.pth", config=None):
        overrides = [f"model.model_kwargs.checkpoint_path={trained / checkpoint}", f"predict.input={place}", *more]
        predictor = Predictor(load_config(config or trained / "config.yaml", overrides, mode="predict"), Process())
        assert predictor.run() == 0
        return predictor

    return do


def probabilities(folder, image: Image.Image) -> list[float]:
    """Return the class probabilities of an image, prepared by hand."""
    network = create_model("timm_mobilenetv3_small_050", num_classes=3, drop_rate=0.2).eval()
    network.load_state_dict(load_training_checkpoint(folder / "latest_ckpt.pth")["net"])
    image = F.resize(image, int(SIZE / 0.875), F.InterpolationMode.BICUBIC)
    tensor = F.normalize(F.to_tensor(F.center_crop(image, SIZE)), MEAN, STD)
    with torch.no_grad():
        return network(tensor[None]).softmax(1)[0].tolist()


@pytest.mark.parametrize("name", ["net.pth", "net_E.pth", "latest_ckpt.pth"])
def test_checkpoints_tell_how_the_network_was_tested(trained, name):
    told = torch.load(trained / name, weights_only=True, mmap=True)["test_transform"]
    known = {"size": [SIZE, SIZE], "crop_pct": 0.875, "interpolation": "bicubic", "mean": [*MEAN], "std": [*STD]}
    assert told == known


def test_predictions_are_those_of_a_plain_loop(trained, predict, class_folders):
    more = ("trainer.data.batch_size_per_gpu_test=2", "trainer.data.num_workers_per_gpu=1")
    found = predict(class_folders / "val", *more, checkpoint="latest_ckpt.pth").predictions
    assert len(found) == 15
    for prediction in found[::4]:
        expected = probabilities(trained, Image.open(prediction.path))
        order = np.argsort(expected)[::-1]
        assert [score.index for score in prediction.classes] == order.tolist()
        assert [score.probability for score in prediction.classes] == pytest.approx(
            [expected[i] for i in order], abs=1e-5
        )


def test_screen_json_and_csv_say_the_same(predict, class_folders, tmp_path, capsys):
    setup_console(is_logging=True)
    runs = [
        predict(class_folders / "val" / "*" / "[01].png", "predict.top_k=2", f"predict.output={tmp_path / name}")
        for name in ("new/all.json", "all.CSV")
    ]
    assert runs[0].predictions == runs[1].predictions
    content = json.loads((tmp_path / "new" / "all.json").read_text())
    assert content["model"] == "timm_mobilenetv3_small_050"
    assert content["weights"].endswith("net.pth")
    with (tmp_path / "all.CSV").open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = capsys.readouterr().out
    assert len(content["images"]) == 6
    assert len(rows) == 12
    for image in content["images"]:
        own = [row for row in rows if row["path"] == image["path"]]
        assert [row["rank"] for row in own] == ["1", "2"]
        for entry, row in zip(image["classes"], own, strict=True):
            assert entry["class"] == entry["name"] == row["name"] == ("blue", "green", "red")[entry["index"]]
            assert float(row["probability"]) == entry["probability"]
        shown = [f"  {100 * entry['probability']:6.2f} %  {entry['name']}" for entry in image["classes"]]
        assert "\n".join([image["path"], *shown]) in text
    assert "3 classes, called by the checkpoint's own names" in text


@pytest.mark.parametrize("checkpoint", ["net.pth", "net_E.pth", "latest_ckpt.pth"])
def test_classes_are_counted_and_named_by_the_checkpoint(predict, class_folders, checkpoint):
    """The recipe says 1000 classes, and the images lie elsewhere: only the file tells."""
    more = ("size=32", *TINY_NETWORK, "data.root=none", "trainer.device=cpu")
    predictor = predict(class_folders / "val" / "red" / "0.png", *more, checkpoint=checkpoint, config=CONFIG)
    assert predictor.config.nb_classes == 3
    assert sorted(score.words for score in predictor.predictions[0].classes) == ["blue", "green", "red"]


def test_a_class_count_that_is_given_must_be_the_checkpoints(predict, class_folders):
    with pytest.raises(ValueError, match="3 classes in the file and 4 in the network"):
        predict(class_folders / "val", "nb_classes=4")


def test_every_kind_of_file_gets_the_prediction_of_its_pixels(trained, predict, class_folders, tmp_path):
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, (40, 60), dtype=np.uint8)
    colour = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    palette = colour.quantize(16)
    smooth = Image.new("RGB", (60, 40), (200, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(tmp_path / "turned.png", exif=exif)
    palette.save(tmp_path / "palette.png", transparency=3)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    smooth.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    Image.new("RGB", (1, 1), (0, 0, 200)).save(tmp_path / "one.png")
    expected = {
        "turned.png": colour,
        "palette.png": palette.convert("RGB"),
        "deep.png": Image.fromarray(grey).convert("RGB"),
        "cmyk.jpg": smooth,
        "one.png": Image.new("RGB", (9, 9), (0, 0, 200)),
    }

    def found(*more):
        predictions = predict(tmp_path, *more, checkpoint="latest_ckpt.pth").predictions
        return {entry.path: dict(score[::3] for score in entry.classes) for entry in predictions}

    plain = found(f"predict.sheet={tmp_path / 'sheets' / 'all.png'}")
    (tmp_path / "sheets" / "all.png").unlink()
    for name, image in expected.items():
        tolerance = 0.02 if name == "cmyk.jpg" else 1e-5
        wanted = dict(enumerate(probabilities(trained, image)))
        assert plain[str(tmp_path / name)] == pytest.approx(wanted, abs=tolerance), name
    upright = found("data.loader_type=pil_upright")
    turned = dict(enumerate(probabilities(trained, colour.transpose(Image.Transpose.ROTATE_270))))
    assert upright.pop(str(tmp_path / "turned.png")) == pytest.approx(turned, abs=1e-5)
    assert upright == {name: scores for name, scores in plain.items() if not name.endswith("turned.png")}


def test_the_rest_is_predicted_where_a_file_is_broken(predict, class_folders, tmp_path, capsys):
    setup_console(is_logging=True)
    for name in ("0", "2"):
        shutil.copy(class_folders / "val" / "red" / f"{name}.png", tmp_path)
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:100])
    (tmp_path / "3.jpg").write_text("<html>")
    more = ("predict.output", tmp_path / "out.csv"), ("predict.sheet", tmp_path / "out" / "sheet.webp")
    with pytest.raises(RunError, match=r"2 of 4 images have no prediction: .*1\.png, .*3\.jpg") as stop:
        predict(tmp_path, *(f"{entry}={value}" for entry, value in more))
    assert stop.value.exit_code == 2
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["path"][-5:]: bool(row["error"]) for row in rows} == {
        "0.png": False, "1.png": True, "2.png": False, "3.jpg": True
    }  # fmt: skip
    assert "3.jpg\n  unreadable image (not an image" in capsys.readouterr().out
    assert (tmp_path / "out" / "sheet.webp").is_file()


def test_the_sheet_shows_the_first_images(predict, class_folders, tmp_path):
    path = tmp_path / "sheet.png"
    predict(class_folders / "val" / "red", f"predict.sheet={path}", "predict.sheet_images=3", "predict.top_k=2")
    sheet = Image.open(path)
    assert sheet.size == (GAP + 3 * (SIDE + GAP), 3 * GAP + SIDE + 3 * LINE)
    for index in range(3):
        left = GAP + index * (SIDE + GAP)
        shown = sheet.crop((left, GAP, left + SIDE, GAP + SIDE)).resize((36, 36), Image.Resampling.BOX)
        original = np.asarray(Image.open(class_folders / "val" / "red" / f"{index}.png")).astype(int)
        assert np.abs(np.asarray(shown) - original).mean() < 12


def test_the_sheet_shows_where_the_network_looks(predict, class_folders, tmp_path):
    pytest.importorskip("pytorch_grad_cam")
    path = tmp_path / "sheet.png"
    more = (f"predict.sheet={path}", "predict.sheet_images=4", "predict.top_k=1")
    plain = predict(class_folders / "val" / "red", *more).predictions
    assert predict(class_folders / "val" / "red", *more, "predict.explain=true").predictions == plain
    sheet = np.asarray(Image.open(path)).astype(int)
    assert sheet.shape[1] == GAP + 3 * (2 * SIDE + INNER_GAP + GAP)
    image, overlay = (sheet[GAP : GAP + SIDE, left : left + SIDE] for left in (GAP, GAP + SIDE + INNER_GAP))
    blue = [picture[..., 2].mean() - picture[..., 0].mean() for picture in (image, overlay)]
    assert blue[0] < -20  # the picture is red,
    assert np.ptp(overlay[..., 2]) > 100  # and the colours of the map go from blue to red
    assert blue[1] > blue[0] + 20


def test_an_answer_that_is_no_number_is_an_error(predict, trained, class_folders, tmp_path):
    weights = torch.load(trained / "net.pth", weights_only=True)
    weights["net"]["classifier.bias"][1] = float("nan")
    torch.save(weights, trained / "broken.pth")
    with pytest.raises(RunError, match="5 of 5 images have no prediction"):
        predict(class_folders / "val" / "red", f"predict.output={tmp_path / 'a.json'}", checkpoint="broken.pth")
    assert "not finite" in json.loads((tmp_path / "a.json").read_text())["images"][0]["error"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["predict.input="], "needs images: give predict.input"),
        (["predict.output=all.txt"], r"predict\.output=all\.txt: expected a file name that ends in \.json or \.csv"),
        (["predict.explain=true"], r"predict\.explain=true draws on the sheet: give predict\.sheet"),
        (["predict.sheet=sheet"], r"predict\.sheet=sheet: expected .*\.png"),
        (["model.model_kwargs.checkpoint_path="], "-m predict needs weights"),
        (["model.name=MobileMamba_T2", "model.model_kwargs.extra={}"], r"lacks head\.l\.weight: name the network"),
    ],
)
def test_mistakes_are_said_before_anything_is_read(predict, class_folders, overrides, message):
    with pytest.raises(ValueError, match=message):
        predict(class_folders / "val", *overrides)


@pytest.mark.parametrize(("entry", "name"), [("output", "a.json"), ("sheet", "a.png"), ("sheet", "link.png")])
def test_an_image_is_not_overwritten(predict, class_folders, tmp_path, entry, name):
    for image in ("a.png", "a.json"):  # the second is an image all the same
        shutil.copy(class_folders / "val" / "red" / "0.png", tmp_path / image)
    (tmp_path / "link.png").symlink_to("a.png")
    place = tmp_path / ("a.json" if entry == "output" else "*.png")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"predict\.{entry}=.*{name} is one of the images to predict"):
        predict(place, f"predict.{entry}={tmp_path / name}")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("entry", ["output", "sheet"])
def test_a_folder_is_not_overwritten(predict, class_folders, tmp_path, entry):
    path = tmp_path / ("a.json" if entry == "output" else "a.png")
    path.mkdir()
    with pytest.raises(ValueError, match=rf"predict\.{entry}=.*{path.name} is a folder; add a file name"):
        predict(class_folders / "val", f"predict.{entry}={path}")


def test_hostile_names_and_pipes(predict, class_folders, tmp_path, capsys):
    setup_console(is_logging=True)
    name = "=1+1\x1b[31m\n%s\udcff.png"
    shutil.copy(class_folders / "val" / "red" / "0.png", tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "left.heif2").write_bytes(b"")
    with pytest.raises(RunError, match=r"1 of 2 images have no prediction: .*pipe\.png$"):
        predict(tmp_path, f"predict.output={tmp_path / 'all.json'}")
    images = json.loads((tmp_path / "all.json").read_text())["images"]
    assert {image["path"]: image.get("error") for image in images} == {
        str(tmp_path / name): None,
        str(tmp_path / "pipe.png"): "unreadable image (a pipe or device, not a regular file)",
    }
    text = capsys.readouterr().out
    assert r"=1+1\x1b[31m\n%s\udcff.png" in text
    assert "\x1b" not in text
    assert "1 stray files are ignored (1 .heif2)" in text


def test_entries_of_predict_need_its_mode():
    with pytest.raises(ValueError, match=r"predict\.input holds only with -m predict$"):
        load_config(CONFIG, ["predict.input=a.png"], mode="test")


def test_the_command(launch, trained, class_folders, tmp_path):
    arguments = ("-c", str(trained / "config.yaml"), "-m", "predict")
    checkpoint = f"model.model_kwargs.checkpoint_path={trained / 'net_E.pth'}"
    (tmp_path / "a.png").write_bytes(b"")
    done = launch(*arguments, checkpoint, f"predict.input={tmp_path}", check=2)
    assert done.stderr.strip() == f"error: 1 of 1 images have no prediction: {tmp_path / 'a.png'}"
    both = launch(
        *arguments, checkpoint, f"predict.input={class_folders / 'val'}", f"predict.output={tmp_path / 'both.json'}",
        num_processes=2, check=0,
    )  # fmt: skip
    assert both.stdout.count(" %  red") == 15
    predicted = json.loads((tmp_path / "both.json").read_text())["images"]
    assert [image["path"] for image in predicted] == sorted(str(path) for path in (class_folders / "val").glob("*/*"))
