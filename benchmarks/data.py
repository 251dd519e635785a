"""The training pipeline's images/s by format, decoder and workers, and where the time goes.

    python -m benchmarks.data [--quick] [--workers 0 2] [--images 512] [--size 224] [--root FOLDER]

Without ``--root``, the images are crops of scikit-learn's two photographs, 500 x 375 pixels, with the mean size of an
ImageNet file. Each is augmented as the recipe has it. A run is an epoch, without the start of its workers.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_sample_images

from configs.schema import CenterCrop, Config, Normalize, Resize, TimmTrainTransform, ToTensor
from data import ImageDataset, TrainLoader, build_loaders, build_transform
from data.images import decode
from data.prepare import folder_to_lmdb, to_shards
from data.samples import Sample, collate, isolated_randomness

from .common import (
    FULL,
    Timing,
    add_arguments,
    describe_machine,
    main,
    measure,
    result_path,
    save_result,
    set_up,
    speedup,
    summary_line,
    table,
)
from .parsers import new_parser

__all__ = ["Case", "parse", "run"]

FORMATS = {"DefaultCLS": "folders", "ImageFolderLMDB": "lmdb", "Shards": "shards"}
WAYS = (  # who decodes, who resizes the crop, who shears, shifts and rotates
    ("pil", "pil", "pil"),
    ("simplejpeg", "pil", "pil"),
    ("simplejpeg", "torch", "pil"),
    ("simplejpeg_fast", "torch", "pil"),
    ("simplejpeg_fast", "torch", "opencv"),
)
STAGES = ("read", "decode", "augment", "collate")
QUALITY = 98  # makes files of about 110 kB, the mean of ImageNet's
BATCH = 32


@dataclass(frozen=True)
class Case:
    """One pipeline.

    Attributes:
        type: Of the data set; a key of `FORMATS`.
        loader_type: Who decodes.
        resize: Who resizes the crop.
        warp: Who shears, shifts and rotates.
        workers: Processes that read; with 0 the main process does, on one core.
    """

    type: str
    loader_type: str
    resize: str
    warp: str
    workers: int


BASELINE = Case("DefaultCLS", *WAYS[0], 0)


def write_images(folder: Path, num_images: int) -> None:
    """Write made-up class folders of JPEG files."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draw = random.Random(0)
    for number in range(num_images):
        photograph = photographs[number % 2]
        width = draw.randint(400, photograph.width)
        height = min(width * 3 // 4, photograph.height)
        left, top = draw.randint(0, photograph.width - width), draw.randint(0, photograph.height - height)
        image = photograph.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.BICUBIC)
        for split in ("train", "val"):
            path = folder / split / f"class {number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if split == "train" or number < 2:
                image.save(path, quality=QUALITY)


def configuration(case: Case, root: Path, *, size: int, num_classes: int) -> Config:
    """Return the resolved entries that a loader reads."""
    config = Config(mode="train", nb_classes=num_classes, size=size)
    config.data.type, config.data.root, config.data.loader_type = case.type, str(root), case.loader_type
    config.data.channels, config.data.nb_classes = 3, num_classes
    config.data.train_transforms = [_augmentation(case, size)]
    config.data.test_transforms = [Resize(size=size), CenterCrop(size=size), ToTensor(), Normalize()]
    options = config.trainer.data
    options.batch_size_per_gpu, options.num_workers_per_gpu = BATCH, case.workers
    options.persistent_workers, options.drop_last = True, False
    return config


def _augmentation(case: Case, size: int) -> TimmTrainTransform:
    return TimmTrainTransform(input_size=size, resize=case.resize, warp=case.warp)


def prepare(folder: Path, root: Path) -> dict[str, Path]:
    """Return the folder of each format, made below ``folder`` from the class folders in ``root``."""
    lmdb, shards = folder / "lmdb", folder / "shards"
    folder_to_lmdb(root, lmdb)
    to_shards(root, shards)
    return dict(zip(FORMATS, (root, lmdb, shards), strict=True))


def epoch(loader: TrainLoader) -> Callable[[], None]:
    """Return what reads an epoch."""

    def run_epoch() -> None:
        for _ in loader.iterate(0):
            pass

    return run_epoch


def stage_times(dataset: ImageDataset, case: Case, *, size: int, num_images: int) -> dict[str, float]:
    """Return seconds per image of each stage, one after another in this process."""
    transform = build_transform([_augmentation(case, size)])
    is_array = case.loader_type.startswith("simplejpeg")
    seconds = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments, **options)
        seconds[stage] += time.perf_counter() - start
        return result

    def sample(index: int) -> Sample:
        data = timed("read", dataset.read_bytes, index)
        image = timed("decode", decode, data, name="", loader_type=case.loader_type, as_array=is_array)
        with isolated_randomness(index):
            return Sample(timed("augment", transform, image), 0)

    for start in range(0, num_images, BATCH):
        samples = [sample(index) for index in range(start, min(start + BATCH, num_images))]
        timed("collate", collate, samples)
    return {stage: value / num_images for stage, value in seconds.items()}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and write the result; return the content of the result file."""
    plan = set_up(arguments, full=FULL)
    machine = describe_machine("cpu")
    print(summary_line(machine))
    cases = [Case(kind, *WAYS[0], workers) for workers in arguments.workers for kind in FORMATS]
    cases += [Case("Shards", *way, workers) for workers in arguments.workers for way in WAYS[1:]]
    cases = list(dict.fromkeys([BASELINE, *cases]))
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.root
        if root is None:
            root = Path(folder, "folders")
            write_images(root, arguments.images)
        roots = prepare(Path(folder), root)
        num_classes = sum(path.is_dir() for path in (root / "train").iterdir())
        loaders = {case: _loader(case, roots, size=arguments.size, num_classes=num_classes) for case in cases}
        num_images = len(loaders[BASELINE].dataset)
        timings = measure({case: epoch(loader) for case, loader in loaders.items()}, plan, "cpu")
        stages = [
            {**asdict(case), **stage_times(loader.dataset, case, size=arguments.size, num_images=num_images)}
            for case, loader in loaders.items()
            if case.workers == 0
        ]
    rows = [_row(case, timing, timings[BASELINE], num_images) for case, timing in timings.items()]
    _print(rows, stages)
    figures = {"cases": rows, "stages": stages, "images": num_images}
    path = result_path(arguments, "data", machine)
    print(f"\n{save_result(path, 'data', machine, arguments, plan=vars(plan), **figures)}")
    return {"benchmark": "data", "machine": machine, **figures}


def _loader(case: Case, roots: dict[str, Path], *, size: int, num_classes: int) -> TrainLoader:
    config = configuration(case, roots[case.type], size=size, num_classes=num_classes)
    loader = build_loaders(config, rank=0, world_size=1).train
    assert loader is not None, "the mode is training"
    return loader


def _row(case: Case, timing: Timing, baseline: Timing, num_images: int) -> dict[str, Any]:
    rate = num_images / timing.median
    return {**asdict(case), "images_per_s": rate, "speedup": speedup(timing, baseline), **timing.as_dict()}


def _print(rows: Sequence[dict[str, Any]], stages: Sequence[dict[str, Any]]) -> None:
    print("\nTraining pipeline, images/s; over folders, Pillow and no workers\n")
    keys = ("type", "loader_type", "resize", "warp", "workers", "images_per_s", "speedup")
    print(table([tuple(row[key] for key in keys) for row in rows], (*keys[:5], "images/s", "over")))
    print("\nOne process, milliseconds an image\n")
    cells = [(*(row[key] for key in keys[:4]), *(1e3 * row[stage] for stage in STAGES)) for row in stages]
    print(table(cells, (*keys[:4], *STAGES)))


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments, with what is left to ``--quick`` filled in."""
    parser = new_parser("data", __doc__)
    add_arguments(parser)
    parser.set_defaults(device="cpu", threads=1)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="processes that read")
    parser.add_argument("--images", type=int, help="made-up images")
    parser.add_argument("--size", type=int, default=224, help="pixels of the crop")
    parser.add_argument("--root", type=Path, help="class folders to measure with, in place of made-up images")
    arguments = parser.parse_args(command_line)
    arguments.images = arguments.images or (128 if arguments.quick else 512)
    return arguments


if __name__ == "__main__":
    main(parse, run)
