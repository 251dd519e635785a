"""Effective receptive fields: how much each pixel of the input counts for the centre of a feature map.

``python -m model.erf MobileMamba_T2=net.pth timm_efficientvit_m5 --data photos --out erf.png`` draws the fields of
several networks side by side and prints what share of the image holds 20, 30, 50 and 99 % of the contribution.

The field is that of Luo et al. (arXiv 1701.04128) as RepLKNet and VMamba measure it (arXiv 2203.06717, 2401.10166): the
gradient of the positive features at the centre with respect to the input; its positive part is summed over channels and
averaged over images. B batch, C channels, H height, W width.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from . import create_model
from .command import exit_code
from .erf_panel import Panel, save_panels
from .messages import listed
from .pictures import find_pictures, read_picture

__all__ = ["THRESHOLDS", "area_shares", "main", "receptive_field"]

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)  # of the contribution, as RepLKNet and VMamba report them
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = 0.875  # share of the resized image's side that is looked at
DEFAULT_NETWORK = "MobileMamba_T2"


def receptive_field(network: nn.Module, images: Iterable[Tensor], *, stage: int = -1) -> Tensor:
    """Return the effective receptive field of the centre of a feature map: (H, W), float64, none of it negative.

    Args:
        network: In evaluation mode. One of timm's kind gives the feature maps of its stages, any other its output.
        images: (B, C, H, W) each, of one size, normalised.
        stage: Index of the feature map, from 0 or from the end.

    Raises:
        ValueError: If there is no image, no such stage, or the feature map is not (B, C, H, W).
    """
    total, num_images = None, 0
    for batch in images:
        batch = batch.detach().requires_grad_()
        features = _features(network, batch, stage)
        row, column = features.shape[2] // 2, features.shape[3] // 2
        centre = torch.relu(features[:, :, row, column]).sum()
        (gradient,) = torch.autograd.grad(centre, batch)
        contribution = torch.relu(gradient).double().sum((0, 1))
        total = contribution if total is None else total + contribution
        num_images += len(batch)
    if total is None:
        raise ValueError("an effective receptive field needs images: there is none")
    return total.cpu() / num_images


def _features(network: nn.Module, images: Tensor, stage: int) -> Tensor:
    take = getattr(network, "forward_intermediates", None)
    if take is None:
        features = network(images)
    else:
        try:
            (features,) = take(images, indices=[stage], intermediates_only=True)
        except (AssertionError, IndexError) as error:  # what timm's networks raise
            raise ValueError(f"{type(network).__name__} has no stage {stage}: {error}") from error
    if features.dim() != 4:
        raise ValueError(f"a feature map must be (B, C, H, W), that of {type(network).__name__} is {features.shape}")
    return features


def area_shares(contribution: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> list[float]:
    """Return for each threshold the share of the image's area in the smallest square that holds so much of a field.

    The squares lie around the field's middle, the medians of its rows and columns, as strides shift it. They
    end where the image does.

    Args:
        contribution: Of each pixel (H, W).
        thresholds: Shares of the whole contribution, up to 1.

    Raises:
        ValueError: If nothing contributes.
    """
    weights = contribution.double().numpy()
    if not weights.sum() > 0:
        raise ValueError("no pixel contributes: the features at the centre do not depend on the input")
    rows, columns = (np.abs(np.arange(len(sums)) - _median(sums)) for sums in (weights.sum(1), weights.sum(0)))
    distance = np.maximum(rows[:, None], columns[None])  # the square that a pixel is first in
    held = np.bincount(distance.ravel(), weights=weights.ravel()).cumsum() / weights.sum()
    area = np.bincount(distance.ravel()).cumsum() / weights.size
    return [float(area[min(int(np.searchsorted(held, level - 1e-9)), len(area) - 1)]) for level in thresholds]


def _median(weights: np.ndarray) -> int:
    """Return the first index up to which half of the weights lie."""
    return int(np.searchsorted(weights.cumsum(), weights.sum() / 2))


def noise(number: int, size: int, channels: int) -> Iterator[Tensor]:
    """Yield images of standard normal noise, the same each time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        yield torch.randn(1, channels, size, size, generator=generator)


def photos(paths: Sequence[Path], size: int, mean: Sequence[float], std: Sequence[float]) -> Iterator[Tensor]:
    """Yield the middle of each image at a size, normalised (1, 3, H, W).

    Raises:
        ValueError: If an image cannot be read.
    """
    for path in paths:
        image = read_picture(path)
        scale = size / CROP / min(image.size)
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        pixels = torch.from_numpy(np.asarray(image.crop((left, top, left + size, top + size))) / 255.0)
        normalised = (pixels - torch.tensor(mean)) / torch.tensor(std)
        yield normalised.permute(2, 0, 1)[None].float()


def some_pictures(folder: Path, number: int) -> list[Path]:
    """Return up to so many pictures in a folder and below, evenly spaced among all.

    Raises:
        FileNotFoundError: If there is no picture in it, or no such folder.
    """
    paths = find_pictures(folder)
    return [paths[index * len(paths) // number] for index in range(number)] if number < len(paths) else paths


class Result(NamedTuple):
    """The field of one network, with what it was measured on."""

    name: str
    weights: str
    size: int
    num_images: int
    field: Tensor
    shares: list[float]


def _measure(argument: str, options: argparse.Namespace, paths: Sequence[Path]) -> Result:
    name, _, checkpoint = argument.partition("=")
    torch.manual_seed(options.seed)
    network = create_model(
        name,
        pretrained=options.pretrained and not checkpoint,
        checkpoint_path=checkpoint,
        ema=bool(checkpoint) and options.ema,
        reset_head=bool(checkpoint),
    )
    network.eval().requires_grad_(False).to(options.device)
    cfg = getattr(network, "pretrained_cfg", None) or {}
    size = options.size or cfg.get("input_size", (3, getattr(network, "img_size", 224)))[-1]
    images: Iterable[Tensor]
    if paths:
        images, number = photos(paths, size, cfg.get("mean", MEAN), cfg.get("std", STD)), len(paths)
    else:
        images, number = noise(options.images, size, getattr(network, "in_chans", 3)), options.images
    bar = tqdm(images, desc=name, total=number, leave=False, disable=not sys.stderr.isatty())
    field = receptive_field(network, (image.to(options.device) for image in bar), stage=options.stage)
    weights = checkpoint or ("pretrained" if options.pretrained else "random weights")
    return Result(name, weights, size, number, field, area_shares(field))


def _print(results: Sequence[Result]) -> None:
    width = max(len(result.name) for result in results)
    heads = "".join(f"{100 * level:g} %".rjust(9) for level in THRESHOLDS)
    print(f"share of the area that holds so much of the contribution\n{'network'.ljust(width)}    px{heads}  weights")
    for result in results:
        shares = "".join(f"{100 * share:.1f} %".rjust(9) for share in result.shares)
        print(f"{result.name.ljust(width)}{result.size:6d}{shares}  {result.weights}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and draw as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.erf", description="Measure and draw effective receptive fields."
    )
    parser.add_argument(
        "networks",
        nargs="*",
        default=[DEFAULT_NETWORK],
        metavar="NETWORK[=CHECKPOINT]",
        help=f"variants, or timm_<name> for any network of timm; {DEFAULT_NETWORK} if none is named",
    )
    parser.add_argument("--checkpoint", default="", help="weights of the first network; random without any")
    parser.add_argument("--pretrained", action="store_true", help="download weights where no checkpoint is named")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of the checkpoints")
    parser.add_argument("--data", type=Path, help="folder with images, at any depth; normal noise without it")
    parser.add_argument("--images", type=int, default=50, help="number of images (default: 50)")
    parser.add_argument("--size", type=int, default=0, help="side in pixels; each network's own without it")
    parser.add_argument("--stage", type=int, default=-1, help="feature map, from 0 or from the end (default: -1)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("erf.png"), help="picture to write (default: erf.png)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.images < 1:
        raise ValueError(f"--images {options.images}: at least one is needed")
    networks = list(options.networks)
    if options.checkpoint:
        if "=" in networks[0]:
            raise ValueError(f"{networks[0]} and --checkpoint {options.checkpoint} name two files: give one of them")
        networks[0] = f"{networks[0]}={options.checkpoint}"
    if options.out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {options.out}: expected a picture's extension, {listed(['.png', '.jpg', '.webp'])}")
    paths = some_pictures(options.data, options.images) if options.data else []
    results = [_measure(network, options, paths) for network in networks]
    _print(results)
    panels = [
        Panel(
            title=result.name,
            lines=(f"{Path(result.weights).name}, {result.size} px", _shares_line(result.shares)),
            contribution=result.field.numpy(),
        )
        for result in results
    ]
    save_panels(panels, options.out)
    if options.json:
        options.json.write_text(json.dumps([_entry(result) for result in results], indent=1) + "\n", encoding="utf-8")
    print(options.out)


def _shares_line(shares: Sequence[float]) -> str:
    return "  ".join(f"{100 * level:g}%: {100 * share:.1f}" for level, share in zip(THRESHOLDS, shares, strict=True))


def _entry(result: Result) -> dict[str, object]:
    area = {f"{level:g}": share for level, share in zip(THRESHOLDS, result.shares, strict=True) if math.isfinite(share)}
    names = {"network": result.name, "weights": result.weights, "size": result.size, "images": result.num_images}
    return {**names, "area": area}


if __name__ == "__main__":
    sys.exit(main())
