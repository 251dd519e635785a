"""Counts a model's parameters, and its multiply-accumulates on one image, which the tables call FLOPs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from model.profile import count_macs
from util.cores import count_cores, limit_threads

from .arguments import add_options
from .errors import InputError, exit_code_of
from .inference import build_network
from .settings import load_config

__all__ = ["OnOneImage", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both; the exit code is 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description="Count a model's parameters and its operations on one image.")
    parser.add_argument("config", help="a config file, with or without .py")
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        default=[512],
        metavar="PIXELS",
        help="the image's side, or height and width (512)",
    )
    add_options(parser)
    parsed = parser.parse_args(arguments)
    return exit_code_of(lambda: _count(parsed))


class OnOneImage(nn.Module):
    """A model as a function of one image, (1, 3, H, W) -> what its heads give before any selection.

    Args:
        network: A detector, segmentor or classifier.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the heads' outputs; a two-stage detector's second stage sees the proposals of its first."""
        size = tuple(image.shape[-2:])
        sizes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), size)
        return self.network(image, [BaseDataElement(metainfo={**sizes, "scale_factor": (1.0, 1.0)})], mode="tensor")


def _count(parsed: argparse.Namespace) -> None:
    limit_threads(count_cores())
    if len(parsed.shape) > 2 or min(parsed.shape) < 32:
        raise InputError(
            f"--shape {' '.join(map(str, parsed.shape))}: give a side, or height and width, from 32 pixels"
        )
    height, width = parsed.shape[0], parsed.shape[-1]
    config = load_config(parsed.config, parsed.cfg_options, data_root=parsed.data_root)
    network = build_network(config, device="cpu")
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    macs = count_macs(OnOneImage(network), (height, width))
    print(f"{num_parameters:,} parameters\n{macs / 1e9:.2f} G multiply-accumulates on {height} x {width} pixels")
