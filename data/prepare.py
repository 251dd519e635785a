"""Makes and checks data sets: ``python -m data.prepare --help``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from model.command import CommandError, exit_code
from model.files import replacing_folder
from model.messages import listed

from .base import FileDataset, ImageDataset, index_names
from .datasets import check_same_classes
from .digits import write_digits
from .folders import DefaultCLS
from .images import decode
from .lmdb_file import LmdbFile, write_lmdb
from .lmdb_folder import ImageFolderLMDB
from .shard_index import find_shards, read_class_names
from .shard_writer import image_suffix, save_index, verify_shards, write_shards
from .shards import build_index
from .split import split_folder

__all__ = ["folder_to_lmdb", "index_shards", "lmdb_to_folder", "main", "to_shards", "verify"]

SPLITS = ("train", "val")
IMAGES_PER_SHARD = 1250  # ImageNet-1K makes 1,025 shards of about 140 MB


def folder_to_lmdb(root: Path, out: Path, *, is_forced: bool = False) -> dict[str, int]:
    """Pack class folders, or the files that lists name, into ``<out>/train.lmdb`` and ``<out>/val.lmdb``.

    The images' bytes stay as they are.

    Args:
        root: Folder with ``train/`` and ``val/``, or one of them.
        out: Where the files go.
        is_forced: Replace files that are there.

    Returns:
        Number of images by split.

    Raises:
        ValueError: If ``root`` is not laid out so, or a file would be replaced.
    """
    splits = [split for split in SPLITS if (root / split).is_dir() or (root / f"{split}.txt").is_file()]
    _require_splits(splits, root, "train/ and val/")
    targets = {split: out / f"{split}.lmdb" for split in splits}
    _refuse_replacing(targets.values(), is_forced=is_forced)
    datasets = {split: DefaultCLS(root, split=split) for split in splits}
    if len(datasets) == len(SPLITS):
        check_same_classes(datasets["train"], datasets["val"])
    class_names = max((dataset.class_names for dataset in datasets.values()), key=len)
    if class_names != sorted(class_names):
        class_names = index_names(len(class_names))  # unpacked, the folders' order must give the indices
    out.mkdir(parents=True, exist_ok=True)
    return {
        split: _pack(dataset, targets[split], class_names=class_names, split=split)
        for split, dataset in datasets.items()
    }


def lmdb_to_folder(root: Path, out: Path, *, is_forced: bool = False) -> dict[str, int]:
    """Unpack ``<root>/train.lmdb`` and ``<root>/val.lmdb`` into class folders ``<out>/train/`` and ``<out>/val/``.

    Files keep their names where the LMDB file has them; otherwise folders and files are numbered.

    Args:
        root: Folder with the LMDB files, or one of them.
        out: Where the folders go.
        is_forced: Replace folders that are there.

    Returns:
        Number of images by split.

    Raises:
        ValueError: If an LMDB file is damaged, holds paths that leave the folder, or a folder would be replaced.
    """
    files = _open_files(root)
    targets = {split: out / split for split in files}
    _refuse_replacing(targets.values(), is_forced=is_forced)
    for split, file in files.items():
        with replacing_folder(targets[split]) as aside:
            _unpack(file, aside, split=split)
    return {split: len(file) for split, file in files.items()}


def to_shards(
    root: Path, out: Path, *, images_per_shard: int = IMAGES_PER_SHARD, seed: int = 0, is_forced: bool = False
) -> dict[str, int]:
    """Write class folders, listed files or LMDB files as tar shards, ``<out>/train-000000.tar`` and so on.

    Args:
        root: Folder with ``train/`` and ``val/``, or ``train.lmdb`` and ``val.lmdb``, or one of them.
        out: Where the shards go. Those of an earlier, interrupted call are kept.
        images_per_shard: In all shards but the last.
        seed: Of the order of the training images.
        is_forced: Write all shards again.

    Returns:
        Number of images by split.

    Raises:
        ValueError: If ``root`` is not laid out so, an image cannot be read, or other shards are there.
    """
    datasets = _open_sources(root)
    if len(datasets) == len(SPLITS):
        check_same_classes(datasets["train"], datasets["val"])
    for split, dataset in datasets.items():
        write_shards(dataset, out, split=split, images_per_shard=images_per_shard, seed=seed, is_forced=is_forced)
    return {split: len(dataset) for split, dataset in datasets.items()}


def index_shards(folder: Path) -> dict[str, int]:
    """Write the indices of a folder's shards beside them, as reading over HTTP takes.

    Returns:
        Number of images by split.

    Raises:
        ValueError: If there are no shards, or one is damaged.
    """
    splits = [split for split in SPLITS if find_shards(folder, split)]
    _require_splits(splits, folder, "train-000000.tar and val-000000.tar")
    counts = {}
    for split in splits:
        index = build_index(folder, split, class_names=read_class_names(folder), has_sha256=True)
        save_index(folder, split, index)
        counts[split] = len(index)
    return counts


def verify(root: Path, *, against: Path | None = None, decodes: bool = False) -> tuple[dict[str, int], list[str]]:
    """Read every image of LMDB files or shards and check it.

    Args:
        root: Folder with ``train.lmdb`` and ``val.lmdb``, or with shards, of one split at least.
        against: What they were made from, to agree with byte by byte.
        decodes: Decode the images, too.

    Returns:
        Number of records by split, and what is wrong.

    Raises:
        ValueError: If a file cannot be opened.
    """
    problems: list[str] = []
    if splits := [split for split in SPLITS if find_shards(root, split)]:
        counts = {}
        for split in splits:
            source = None if against is None else _open_source(against, split)
            counts[split], found = verify_shards(root, split=split, against=source, decodes=decodes)
            problems += found
        return counts, problems
    files = _open_files(root)
    for split, file in files.items():
        dataset = None if against is None else DefaultCLS(against, split=split)
        if dataset is not None and len(dataset) != len(file):
            problems.append(f"{file.path} has {len(file)} images, {dataset.source} {len(dataset)}")
            dataset = None
        for index in _progress(file, f"{split}: checking"):
            problems += _problems(file, index, dataset, decodes=decodes)
    return {split: len(file) for split, file in files.items()}, problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 where ``verify`` finds problems, 2 for bad input, or 130 after Ctrl-C.
    """
    parsed = _parser().parse_args(arguments)
    return exit_code(lambda: parsed.command(parsed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Make and check data sets.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    pack = commands.add_parser("folder-to-lmdb", help="pack class folders into train.lmdb and val.lmdb")
    pack.set_defaults(command=_run_convert, convert=folder_to_lmdb)
    unpack = commands.add_parser("lmdb-to-folder", help="unpack train.lmdb and val.lmdb into class folders")
    unpack.set_defaults(command=_run_convert, convert=lmdb_to_folder)
    shards = commands.add_parser("shards", help="write class folders or LMDB files as tar shards; resumes")
    shards.set_defaults(command=_run_shards)
    for command in (pack, unpack, shards):
        command.add_argument("root", type=Path, help="folder to read")
        command.add_argument("out", type=Path, help="folder to write to")
        command.add_argument("--force", action="store_true", help="replace what is there")
    shards.add_argument("--images", type=_count, default=IMAGES_PER_SHARD, help="per shard (default: %(default)s)")
    shards.add_argument("--seed", type=int, default=0, help="of the order of training images (default: %(default)s)")
    index = commands.add_parser("index", help="write the indices of shards beside them, for reading over HTTP")
    index.set_defaults(command=_run_index)
    index.add_argument("root", type=Path, help="folder with the shards")
    check = commands.add_parser("verify", help="read every image of LMDB files or shards and check it")
    check.set_defaults(command=_run_verify)
    check.add_argument("root", type=Path, help="folder with the LMDB files or shards")
    check.add_argument("--against", type=Path, metavar="ROOT", help="what they were made from")
    check.add_argument("--decode", action="store_true", help="decode the images, too")
    split = commands.add_parser("split", help="split class folders into training and test images")
    split.set_defaults(command=_run_split)
    split.add_argument("root", type=Path, help="folder with one folder of images per class")
    split.add_argument("out", type=Path, help="folder to make")
    split.add_argument("--share", type=_share, default=0.2, help="of each class to test on (default: %(default)s)")
    digits = commands.add_parser("digits", help="write scikit-learn's handwritten digits as class folders")
    digits.set_defaults(command=_run_digits)
    digits.add_argument("out", type=Path, help="folder to make")
    return parser


def _run_convert(parsed: argparse.Namespace) -> None:
    counts = parsed.convert(parsed.root, parsed.out, is_forced=parsed.force)
    print(f"{parsed.out}: {_summary(counts)}")


def _run_shards(parsed: argparse.Namespace) -> None:
    counts = to_shards(
        parsed.root, parsed.out, images_per_shard=parsed.images, seed=parsed.seed, is_forced=parsed.force
    )
    print(f"{parsed.out}: {_summary(counts)}")


def _run_index(parsed: argparse.Namespace) -> None:
    print(f"{parsed.root}: {_summary(index_shards(parsed.root))}")


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count of 1 or more")
    return count


def _run_verify(parsed: argparse.Namespace) -> None:
    counts, problems = verify(parsed.root, against=parsed.against, decodes=parsed.decode)
    if problems:
        raise CommandError(f"{len(problems)} problems: {listed(problems, 20)}")
    print(f"{parsed.root}: {_summary(counts)}, all correct")


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return share


def _run_split(parsed: argparse.Namespace) -> None:
    counts = split_folder(parsed.root, parsed.out, share=parsed.share)
    print(f"{parsed.out}: {_summary(counts)}")


def _run_digits(parsed: argparse.Namespace) -> None:
    is_new = write_digits(parsed.out)
    print(f"{parsed.out}: {'written' if is_new else 'already there and complete'}")


def _summary(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} images in {split}" for split, count in counts.items())


def _progress(items: Sized, title: str) -> Iterable[int]:
    """Return the indices of the items, with a progress bar."""
    return tqdm(range(len(items)), desc=title, unit=" images")


def _open_sources(root: Path) -> dict[str, ImageDataset]:
    names = {split: [f"{split}.lmdb", split, f"{split}.txt"] for split in SPLITS}
    splits = [split for split in SPLITS if any((root / name).exists() for name in names[split])]
    _require_splits(splits, root, "train/ and val/, nor of train.lmdb and val.lmdb")
    return {split: _open_source(root, split) for split in splits}


def _open_source(root: Path, split: str) -> ImageDataset:
    return (ImageFolderLMDB if (root / f"{split}.lmdb").exists() else DefaultCLS)(root, split=split)


def _open_files(root: Path) -> dict[str, LmdbFile]:
    splits = [split for split in SPLITS if (root / f"{split}.lmdb").exists()]
    _require_splits(splits, root, "train.lmdb and val.lmdb")
    return {split: LmdbFile(root / f"{split}.lmdb") for split in splits}


def _require_splits(splits: Sequence[str], root: Path, expected: str) -> None:
    if not splits:
        raise ValueError(f"{root} holds neither of {expected}; give the folder that does")


def _refuse_replacing(targets: Iterable[Path], *, is_forced: bool) -> None:
    present = [target for target in targets if target.exists()]
    if present and not is_forced:
        raise ValueError(f"{listed(present)} would be replaced; add --force if that is meant")


def _pack(dataset: FileDataset, target: Path, *, class_names: list[str], split: str) -> int:
    records = (
        (_packed_path(dataset, index, class_names), dataset.read_bytes(index), int(dataset.labels[index]))
        for index in _progress(dataset, f"{split}: packing")
    )
    return write_lmdb(target, records, class_names=class_names)


def _unpack(file: LmdbFile, folder: Path, *, split: str) -> None:
    for class_name in file.class_names or ():
        (folder / _inside(class_name, file)).mkdir()
    for index in _progress(file, f"{split}: unpacking"):
        data, label = file.record(index)
        path = folder / _unpacked_path(file, index, data, label)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as stream:
            stream.write(data)


def _packed_path(dataset: FileDataset, index: int, class_names: Sequence[str]) -> str:
    """Return ``class/file`` for an image; one that lies in no folder of its class gets a name of one level."""
    class_name = class_names[dataset.labels[index]]
    parts = dataset.path(index).relative_to(dataset.folder).parts
    if class_name in parts[:-1]:
        return "/".join(parts[parts.index(class_name) :])
    return f"{class_name}/{'_'.join(part for part in parts if part not in (os.sep, os.pardir))}"


def _unpacked_path(file: LmdbFile, index: int, data: bytes, label: int) -> PurePosixPath:
    if file.paths is not None:
        return _inside(os.fsdecode(file.paths[index]), file)
    suffix = image_suffix(data, default=".img")
    class_name = f"{label:05d}" if file.class_names is None else file.class_names[label]
    return _inside(f"{class_name}/{index:010d}{suffix}", file)


def _inside(name: str, file: LmdbFile) -> PurePosixPath:
    """Return a relative path that cannot leave the folder it is appended to."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{file.path} names {name!r}, which is not a path inside a folder; it is not unpacked")
    return path


def _problems(file: LmdbFile, index: int, dataset: FileDataset | None, *, decodes: bool) -> list[str]:
    name = file.name(index)
    try:
        data, label = file.record(index)
        if decodes:
            decode(data, name=name, loader_type="pil")
        original = data if dataset is None else dataset.read_bytes(index)
    except ValueError as error:
        return [str(error)]
    problems = []
    if data != original:
        problems.append(f"{name}: the bytes differ from {dataset.name(index)}")
    expected = {
        "__labels__": label if file.labels is None else int(file.labels[index]),
        "the class folders": label if dataset is None else int(dataset.labels[index]),
    }
    problems += [
        f"{name}: class index {label}, but {other} in {source}" for source, other in expected.items() if other != label
    ]
    if file.class_names is not None and label >= len(file.class_names):
        problems.append(f"{name}: class index {label}, but there are {len(file.class_names)} classes")
    return problems


if __name__ == "__main__":
    sys.exit(main())
