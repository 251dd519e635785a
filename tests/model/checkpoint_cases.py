"""A network with the names of MobileMamba's modules at a toy size, files of its weights, and code for a hostile one."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn


class Head(nn.Module):
    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width)
        self.l = nn.Linear(width, num_classes)


class Net(nn.Module):
    """The names of MobileMamba's modules at a toy size."""

    def __init__(self, width: int = 8, depth: int = 2, num_classes: int = 5) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 3)
        self.blocks1 = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        self.head = Head(width, num_classes)


class Payload:
    """Runs a command on unpickling, as a hostile checkpoint would."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def saved(folder: Path, contents: object, name: str = "file.pth", **kwargs: object) -> Path:
    torch.save(contents, folder / name, **kwargs)
    return folder / name
