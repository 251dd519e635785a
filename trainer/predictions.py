"""Predictions as text, as a JSON or CSV file and as a sheet of pictures."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from configs.schema import Predict
from data import Pictures
from model.files import replacing
from model.messages import printable

from .contact_sheet import Tile, draw_sheet
from .explain import Explainer, check_library

__all__ = [
    "ClassScore",
    "Prediction",
    "as_text",
    "check_output",
    "refuse_overwriting",
    "write_predictions",
    "write_sheet",
]

# A spreadsheet runs a cell that begins with one of the first six; the apostrophe marks that one was added.
MARKED = ("=", "+", "-", "@", "\t", "\r", "'")
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
        lines.append(printable(prediction.path))
        lines += [f"  {100 * score.probability:6.2f} %  {printable(score.words)}" for score in prediction.classes]
        lines += [f"  {printable(prediction.error)}"] if prediction.error else []
    return "\n".join(lines)


def check_output(options: Predict) -> None:
    """Make the folders of the files that are asked for.

    Raises:
        ValueError: If the extension of a file names no known format, or a folder has its name; if explanations have no
            sheet, or their library is missing.
        OSError: If a folder cannot be made.
    """
    if options.explain:
        if not options.sheet:
            raise ValueError("predict.explain=true draws on the sheet: give predict.sheet=FILE.png")
        check_library()
    pictures = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    for entry, known in (("output", {".json", ".csv"}), ("sheet", pictures)):
        path = Path(getattr(options, entry)).expanduser()
        if path == Path():
            continue
        if path.is_dir():
            raise ValueError(f"predict.{entry}={path} is a folder; add a file name")
        if path.suffix.lower() not in known:
            examples = ".json or .csv" if entry == "output" else ".png, .jpg or .webp"
            raise ValueError(f"predict.{entry}={path}: expected a file name that ends in {examples}")
        path.parent.mkdir(parents=True, exist_ok=True)


def refuse_overwriting(options: Predict, pictures: Pictures) -> None:
    """Check that no file to write is one of the images.

    Raises:
        ValueError: If one is.
    """
    for entry in ("output", "sheet"):
        path = Path(getattr(options, entry)).expanduser()
        if not path.is_file():
            continue
        for index in range(len(pictures)):
            image = pictures.path(index)
            if image.exists() and image.samefile(path):
                raise ValueError(f"predict.{entry}={path} is one of the images to predict; give another name")


def write_predictions(path: str | Path, predictions: Sequence[Prediction], *, model: str, weights: str) -> None:
    """Write all predictions as JSON or CSV, by the extension; the file appears only when it is whole.

    JSON holds every name exactly. In CSV texts are quoted, and one that a spreadsheet could take for a formula, or that
    begins with an apostrophe, gets an apostrophe in front.

    Args:
        path: The file.
        predictions: The predictions of all images.
        model: The network's name.
        weights: The source of its weights.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path).expanduser()
    with _replacing(path) as aside:
        if path.suffix.lower() == ".csv":
            _write_csv(aside, predictions)
        else:
            _write_json(aside, predictions, model=model, weights=weights)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a file that replaces ``path`` at the end; an error names ``path``."""
    try:
        with replacing(path) as aside:
            yield aside
    except OSError as error:
        cause = f"cannot be written ({error.strerror or error}); what was there before is unchanged"
        raise OSError(error.errno, cause, str(path)) from error


def _write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(COLUMNS)
        writer.writerows(map(_safe, row) for prediction in predictions for row in _rows(prediction))


def _write_json(path: Path, predictions: Sequence[Prediction], *, model: str, weights: str) -> None:
    images = [
        {"path": prediction.path, "error": prediction.error}
        if prediction.error
        else {"path": prediction.path, "classes": [_entry(score) for score in prediction.classes]}
        for prediction in predictions
    ]
    text = json.dumps({"model": model, "weights": weights, "images": images}, indent=1)
    path.write_text(f"{text}\n", encoding="utf-8")


def write_sheet(
    path: str | Path,
    predictions: Sequence[Prediction],
    pictures: Pictures,
    *,
    limit: int,
    explainer: Explainer | None = None,
) -> int:
    """Draw the first images with their classes, and save the picture in the format of its extension, aside at first.

    Args:
        path: The file.
        predictions: The predictions of all images.
        pictures: The images, in the same order.
        limit: Images to draw at most.
        explainer: Draws beside each image where the network sees its first class.

    Returns:
        The number of images on the sheet.

    Raises:
        OSError: If the file cannot be written.
    """
    tiles = [_tile(prediction, pictures, index, explainer) for index, prediction in enumerate(predictions[:limit])]
    path = Path(path).expanduser()
    with _replacing(path) as aside:
        draw_sheet(tiles).save(aside, format=Image.registered_extensions()[path.suffix.lower()])
    return len(tiles)


def _tile(prediction: Prediction, pictures: Pictures, index: int, explainer: Explainer | None) -> Tile:
    image = None if prediction.error else pictures.load(index)[0]
    return Tile(
        image=image,
        title=printable(Path(prediction.path).name),
        bars=[(printable(score.words), score.probability) for score in prediction.classes],
        note=printable(prediction.error),
        overlay=explainer.overlay(image, prediction.classes[0].index) if explainer and image else None,
    )


def _rows(prediction: Prediction) -> list[tuple[object, ...]]:
    if prediction.error:
        return [(prediction.path, "", "", "", "", "", prediction.error)]
    return [(prediction.path, rank, *score, "") for rank, score in enumerate(prediction.classes, start=1)]


def _safe(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(MARKED) else cell


def _entry(score: ClassScore) -> dict[str, object]:
    return {"index": score.index, "class": score.identifier, "name": score.words, "probability": score.probability}
