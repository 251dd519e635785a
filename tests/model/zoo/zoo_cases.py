"""Contents of released files, and the files that an unfinished download leaves."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

from model.mobilemamba import variant_shapes

NAME = "mobilemamba_t2"
REMOTE = "MobileMamba_T2/mobilemamba_t2.pth"
shapes_of_variants = functools.cache(variant_shapes)


def released_weights(entry, downstream=None):
    """Return zeros under the names that a released file has."""
    shapes = shapes_of_variants()[entry.network]
    if entry.task != "imagenet":
        backbone = {f"backbone.{name}": shape for name, shape in shapes.items() if not name.startswith("head.")}
        shapes = {**backbone, **downstream[entry.name]["not_backbone"]}
    return {name: torch.zeros(tuple(shape)) for name, shape in shapes.items()}


def saved(file, contents, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(contents, file, **options)
    return file


def leftovers(file: Path) -> list[str]:
    return [path.name for path in file.parent.glob("*.part*")]


def unfinished(file: Path, url: str, contents: bytes) -> Path:
    """Leave a download from a URL that was killed after these bytes; return its file."""
    file.parent.mkdir(parents=True)
    aside = file.with_name(f"{file.name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part")
    aside.write_bytes(contents)
    return aside
