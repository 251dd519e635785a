"""Weights from one layout to another, without loss: ``python -m model.convert SRC DST --to LAYOUT``.

- ``release``: a bare state dict in a file of torch.save, as the released checkpoints are;
- ``safetensors``: the same entries in a ``.safetensors`` file;
- ``openmmlab``: ``{"state_dict": {"backbone.<entry>": ...}}`` in a file of torch.save, as mmdet, mmseg and mmpretrain
  load it.

Any of them is read, and checkpoints of a training run (``net``, ``net_E``), of timm, Lightning and DeepSpeed, and of
detectors and segmentors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import SAFETENSORS, network_prefixes, read_checkpoint, select_state_dict
from .command import exit_code
from .files import replacing, save_safetensors
from .messages import listed
from .mismatch import INSIDE_MODEL, is_folded_file

__all__ = ["LAYOUTS", "Conversion", "convert", "main"]

LAYOUTS = ("release", "safetensors", "openmmlab")
STEM = "patch_embed."
HEADS = ("head.", "head_dist.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        source: Which weights of the file were taken: ``net``, ``net_E``, ``state_dict``, ..., or ``bare``.
        num_entries: Entries written.
        num_head: Entries of the head among them.
        without_head: Whether the source has a head that was left out.
        num_outside: Entries of a detector or segmentor outside its backbone, which were left out.
    """

    source: str
    num_entries: int
    num_head: int
    without_head: bool
    num_outside: int


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: str,
    ema: bool = False,
    keep_head: bool = True,
    overwrite: bool = False,
) -> Conversion:
    """Write the weights of a checkpoint in another layout: same entries, same bits, same types.

    Args:
        source: A file that `read_checkpoint` reads.
        target: Where to write; it is written aside, then renamed.
        layout: One of `LAYOUTS`.
        ema: Take the averaged weights, where the file holds both.
        keep_head: Write the classifier's entries too.
        overwrite: Replace the target if it exists.

    Raises:
        FileNotFoundError: If there is no source.
        FileExistsError: If the target exists and ``overwrite`` is not set.
        ValueError: If the source cannot be read or holds folded weights or another network's, the layout is unknown, or
            the target's suffix belongs to another.
    """
    source, target = Path(source), Path(target)
    _check_target(target, layout, overwrite=overwrite)
    weights, found = select_state_dict(read_checkpoint(source), ema=ema, origin=source, prefixes=network_prefixes())
    own, num_outside = _backbone(weights, source)
    kept = own if keep_head else {name: value for name, value in own.items() if not name.startswith(HEADS)}
    _save(kept, target, layout)
    num_head = sum(name.startswith(HEADS) for name in kept)
    return Conversion(
        source=found,
        num_entries=len(kept),
        num_head=num_head,
        without_head=len(kept) < len(own),
        num_outside=num_outside,
    )


def _check_target(target: Path, layout: str, *, overwrite: bool) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if (layout == "safetensors") != (target.suffix.lower() == SAFETENSORS):
        wanted = f"end in {SAFETENSORS}" if layout == "safetensors" else f"not end in {SAFETENSORS}, but in .pth"
        raise ValueError(f"{target}: the name of a file of the layout {layout} has to {wanted}")
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{target} exists and was left as it is: name another file, or overwrite it (--overwrite)"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} for {target.name}: make it first")


def _backbone(weights: Mapping[str, Tensor], origin: Path) -> tuple[dict[str, Tensor], int]:
    """Return the network's own entries, and the number of a detector's or segmentor's others."""
    own = {name.removeprefix(INSIDE_MODEL): value for name, value in weights.items() if name.startswith(INSIDE_MODEL)}
    num_outside = len(weights) - len(own) if own else 0
    own = own or dict(weights)
    if is_folded_file(own):
        raise ValueError(
            f"{origin} holds a folded network, whose entries nothing else loads: convert the weights of before fuse()"
        )
    if not any(name.startswith(STEM) for name in own):
        names = listed(list(weights)) or "nothing"
        raise ValueError(f"{origin} holds no weights of MobileMamba ({names}): name another file")
    return own, num_outside


def _save(weights: Mapping[str, Tensor], target: Path, layout: str) -> None:
    if layout == "safetensors":
        save_safetensors(weights, target)
        return
    # Copies, as a tensor that is part of another would be saved with the whole of it.
    contents = {name: value.detach().clone() for name, value in weights.items()}
    with replacing(target) as aside:
        if layout == "openmmlab":
            torch.save(
                {"meta": {}, "state_dict": {f"{INSIDE_MODEL}{name}": value for name, value in contents.items()}}, aside
            )
        else:
            torch.save(contents, aside)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.convert", description="Convert weights without loss."
    )
    parser.add_argument("source", type=Path, help="checkpoint to read, of any layout")
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("--to", dest="layout", required=True, choices=LAYOUTS, help="layout of the file to write")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights, where there are both")
    parser.add_argument("--no-head", dest="keep_head", action="store_false", help="leave the classifier out")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    options = parser.parse_args(arguments)

    def run() -> None:
        done = convert(**vars(options))
        sys.stdout.write(f"{options.target}: {_describe(done, options.layout)}\n")

    return exit_code(run)


def _describe(done: Conversion, layout: str) -> str:
    head = f"{done.num_head} of the head among them" if done.num_head else "none of a head"
    left_out = [
        "the head" if done.without_head else "",
        f"{done.num_outside} entries outside the backbone" if done.num_outside else "",
    ]
    said = " and ".join(part for part in left_out if part)
    return f"{done.num_entries} entries of {done.source} as {layout}, {head}" + (f"; left out: {said}" if said else "")


if __name__ == "__main__":
    sys.exit(main())
