"""Predictions as text, as a JSON or CSV file and as a sheet of pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from configs.schema import Predict
from data import Pictures

from .contact_sheet import Tile, draw_sheet

__all__ = ["ClassScore", "Prediction", "as_text", "check_output", "write_predictions", "write_sheet"]

COLUMNS = ("path", "rank", "index", "class", "name", "probability", "error")


class ClassScore(NamedTuple):
    """One class of an image: its index, its name in the data set, its name in words, its probability."""

    index: int
    identifier: str
    words: str
    probability: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The first classes of an image, or the reason why there are none."""

    path: str
    classes: list[ClassScore]
    error: str = ""


def as_text(predictions: Sequence[Prediction]) -> str:
    """Return every image's name, and below it its classes or what is wrong with it."""
    lines = []
    for prediction in predictions:
        lines.append(_printable(prediction.path))
        lines += [f"  {100 * score.probability:6.2f} %  {_printable(score.words)}" for score in prediction.classes]
        lines += [f"  {_printable(prediction.error)}"] if prediction.error else []
    return "\n".join(lines)


def check_output(options: Predict) -> None:
    """Make the folders of the files that are asked for.

    Raises:
        ValueError: If the extension of a file names no known format.
        OSError: If a folder cannot be made.
    """
    pictures = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    for entry, known in (("output", {".json", ".csv"}), ("sheet", pictures)):
        path = Path(getattr(options, entry)).expanduser()
        if path == Path():
            continue
        if path.suffix.lower() not in known:
            examples = ".json or .csv" if entry == "output" else ".png, .jpg or .webp"
            raise ValueError(f"predict.{entry}={path}: expected a file name that ends in {examples}")
        path.parent.mkdir(parents=True, exist_ok=True)


def write_predictions(path: str | Path, predictions: Sequence[Prediction], *, model: str, weights: str) -> None:
    """Write all predictions as JSON or CSV, by the extension.

    Args:
        path: The file.
        predictions: The predictions of all images.
        model: The network's name.
        weights: The source of its weights.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".csv":
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(row for prediction in predictions for row in _rows(prediction))
        return
    images = [
        {"path": prediction.path, "error": prediction.error}
        if prediction.error
        else {"path": prediction.path, "classes": [_entry(score) for score in prediction.classes]}
        for prediction in predictions
    ]
    text = json.dumps({"model": model, "weights": weights, "images": images}, indent=1)
    path.write_text(f"{text}\n", encoding="utf-8")


def write_sheet(path: str | Path, predictions: Sequence[Prediction], pictures: Pictures, *, limit: int) -> int:
    """Draw the first images with their classes, and save the picture in the format of its extension.

    Args:
        path: The file.
        predictions: The predictions of all images.
        pictures: The images, in the same order.
        limit: Images to draw at most.

    Returns:
        The number of images on the sheet.

    Raises:
        OSError: If the file cannot be written.
    """
    tiles = [
        Tile(
            image=None if prediction.error else pictures.load(index)[0],
            title=_printable(Path(prediction.path).name),
            bars=[(_printable(score.words), score.probability) for score in prediction.classes],
            note=_printable(prediction.error),
        )
        for index, prediction in enumerate(predictions[:limit])
    ]
    draw_sheet(tiles).save(Path(path).expanduser())
    return len(tiles)


def _rows(prediction: Prediction) -> list[tuple[object, ...]]:
    if prediction.error:
        return [(prediction.path, "", "", "", "", "", prediction.error)]
    return [(prediction.path, rank, *score, "") for rank, score in enumerate(prediction.classes, start=1)]


def _entry(score: ClassScore) -> dict[str, object]:
    return {"index": score.index, "class": score.identifier, "name": score.words, "probability": score.probability}


def _printable(text: str) -> str:
    """Return a text that any output accepts: bytes of a file name that are not UTF-8 become escapes."""
    return text.encode(errors="backslashreplace").decode()
