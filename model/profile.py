"""Where a network's parameters, multiply-accumulates, memory and time go, by stage and by kind of layer.

``python -m model.profile MobileMamba_T2 --fuse --json t2.json --plot t2.svg`` measures one image on this machine.
Multiply-accumulates (MACs) are counted by fvcore, with a handle for the selective scan.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from . import create_model
from .command import exit_code
from .lib_mamba import use_backend
from .profile_hooks import Clock, Ledger, Place, find_parts, new_bytes
from .profile_parts import Part, Profile
from .profile_plot import draw_bars
from .profile_trace import new_trace

__all__ = ["Part", "Profile", "count_macs", "gated_scan_macs", "profile", "scan_macs"]

T = TypeVar("T")


def scan_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Return the operations of one `mobilemamba::selective_scan`, as the literature counts them.

    Per direction, position and channel: 9 for each state component (decay, input, recurrence, output), 1 for the
    skip term and R for the low-rank time step, which the operator contains.

    Args:
        inputs: Traced arguments x (B, L, D), projection, dt_weight (K, D, R), dt_bias, A_log (K * D, N), ...
        outputs: Unused; fvcore's signature.
    """
    batch, length, channels = inputs[0].type().sizes()
    num_directions, _, rank = inputs[2].type().sizes()
    num_states = inputs[4].type().sizes()[1]
    return batch * length * num_directions * channels * (9 * num_states + 1 + rank)


def gated_scan_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Return the operations of one `mobilemamba::gated_scan`: the scan's, and 5 for the normalisation.

    Args:
        inputs: Traced arguments x (B, L, D), z, and then those of the scan.
        outputs: Unused; fvcore's signature.
    """
    x, _, *scan = inputs
    batch, length, channels = x.type().sizes()
    return scan_macs([x, *scan], outputs) + 5 * batch * length * channels


@torch.no_grad()
def count_macs(network: nn.Module, size: int | tuple[int, int], *, in_chans: int = 3) -> int:
    """Return the multiply-accumulates of one image, as published tables of FLOPs count them.

    Args:
        network: Any module from images to anything; put into evaluation mode for the count and back.
        size: Side of the square input, or height and width, in pixels.
        in_chans: Channels of the input.
    """
    height, width = (size, size) if isinstance(size, int) else size
    parameter = next(network.parameters())
    image = torch.zeros(1, in_chans, height, width, dtype=parameter.dtype, device=parameter.device)
    was_training = network.training
    total = int(_analyse(network.eval(), image).total())
    network.train(was_training)
    return total


def _analyse(network: nn.Module, images: torch.Tensor) -> FlopCountAnalysis:
    analysis = FlopCountAnalysis(network, images)
    analysis.set_op_handle("mobilemamba::selective_scan", scan_macs)
    analysis.set_op_handle("mobilemamba::gated_scan", gated_scan_macs)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


@torch.no_grad()
def profile(network: nn.Module, images: torch.Tensor, *, name: str = "", runs: int = 20, warmup: int = 3) -> Profile:
    """Measure a network part by part.

    Passes with a clock at every layer take turns with passes that are left alone. A layer's time is its own, without
    that of the layers within; what a module does between its layers is of kind "between layers" or named by the module.

    Args:
        network: In evaluation mode, on its device.
        images: The batch (B, C, H, W), on the same device.
        name: Of the network, in the result.
        runs: Passes of either kind.
        warmup: Passes before, which are not measured.

    Raises:
        ValueError: If there is nothing to measure.
    """
    if runs < 1 or warmup < 0:
        raise ValueError(f"a profile needs runs >= 1 and warmup >= 0, got {runs} and {warmup}")
    places = find_parts(network)
    clock = Clock(images.device)
    for _ in range(warmup):
        network(images)
    ledgers: list[dict[Place, float]] = []
    alone: list[float] = []
    for _ in range(runs):
        alone.append(clock.measure(network, images))
        with Ledger(network, places, clock) as ledger:
            network(images)
        ledgers.append(ledger.seconds())
    parts = {place: Part(stage=place[0], kind=place[1]) for place in dict.fromkeys(places.values())}
    _count(parts, places, network, images)
    middle = _middle_half(ledgers, key=lambda seconds: sum(seconds.values()))
    for place, part in parts.items():
        part.seconds = statistics.fmean(seconds.get(place, 0.0) for seconds in middle)
    total = sum(part.seconds for part in parts.values())
    for part in parts.values():
        part.share = part.seconds / total
    return Profile(
        network=name or type(network).__name__,
        images=tuple(images.shape),
        device=_device_name(images.device),
        seconds=statistics.fmean(_middle_half(alone, key=float)),
        parts=[part for part in parts.values() if part.seconds or part.parameters or part.macs],
    )


def _middle_half(passes: Sequence[T], *, key: Callable[[T], float]) -> list[T]:
    """Return the passes from the first to the third quartile: their mean is robust, and parts of it add up to it."""
    cut = len(passes) // 4
    return sorted(passes, key=key)[cut : len(passes) - cut]


def _count(
    parts: Mapping[Place, Part],
    places: Mapping[str, Place],
    network: nn.Module,
    images: torch.Tensor,
) -> None:
    """Fill in parameters, MACs and bytes."""
    seen: set[int] = set()
    modules = dict(network.named_modules())
    with use_backend("reference"):  # fvcore sees into PyTorch's operators, not into compiled layers
        macs = _analyse(network, images).by_module()
    for name, module in modules.items():
        part = parts[places[name]]
        own = [value for value in module.parameters(recurse=False) if id(value) not in seen]
        seen.update(map(id, own))
        part.parameters += sum(value.numel() for value in own)
        within = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        part.macs += int(macs[name] - sum(macs[child] for child in within))
    for name, count in new_bytes(network, images).items():
        parts[places[name]].bytes += count


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}"


def _table(profile_: Profile, key: str) -> Iterator[str]:
    rows = profile_.sums(key)
    width = max(len(getattr(row, key)) for row in [*rows, Part(stage="stage", kind="kind")])
    yield f"{key.ljust(width)}  params, M    MACs, M  maps, MiB    time, ms    share"
    for row in rows:
        sizes = f"{row.parameters / 1e6:11.3f}{row.macs / 1e6:11.2f}{row.bytes / 2**20:11.2f}"
        yield f"{getattr(row, key).ljust(width)}{sizes}{1e3 * row.seconds:12.3f}{100 * row.share:7.1f} %"


def _write_trace(network: nn.Module, images: torch.Tensor, path: Path) -> None:
    """Write one pass as a trace, with a range for every layer."""
    places = find_parts(network)
    ledger = Ledger(network, places, Clock(images.device), has_ranges=True)
    with new_trace(images.device, record_shapes=True) as trace, ledger:
        network(images)
    trace.export_chrome_trace(str(path))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.profile", description="Say where parameters, MACs, memory and time go."
    )
    parser.add_argument("network", nargs="?", default="MobileMamba_T2", help="a variant, or timm_<name>")
    parser.add_argument("--checkpoint", default="", help="weights; random without any, which changes no figure")
    parser.add_argument("--fuse", action="store_true", help="fold for inference first")
    parser.add_argument("--size", type=int, default=0, help="side in pixels; the network's own without it")
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--runs", type=int, default=20, help="passes measured (default: 20)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--plot", type=Path, help="file for a bar plot, .svg")
    parser.add_argument("--trace", type=Path, help="file for a trace of one pass by torch.profiler, .json")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _run(options))


@torch.no_grad()
def _run(options: argparse.Namespace) -> None:
    if options.plot and options.plot.suffix.lower() != ".svg":
        raise ValueError(f"--plot {options.plot}: expected a file name that ends in .svg")
    network = create_model(
        options.network,
        checkpoint_path=options.checkpoint,
        reset_head=bool(options.checkpoint),
        fuse=options.fuse,
    )
    network.eval().to(options.device)
    cfg = getattr(network, "pretrained_cfg", None) or {}
    size = options.size or cfg.get("input_size", (3, 224))[-1]
    images = torch.zeros(options.batch, getattr(network, "in_chans", 3), size, size, device=options.device)
    measured = profile(network, images, name=options.network, runs=options.runs)
    total = sum(part.seconds for part in measured.parts)
    print(
        f"{measured.network}{', folded' if options.fuse else ''}, {options.batch} x {size} px, {measured.device}: "
        f"{1e3 * measured.seconds:.3f} ms; with a clock at every layer {1e3 * total:.3f} ms"
    )
    for key in ("stage", "kind"):
        print("", *_table(measured, key), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(asdict(measured), indent=1) + "\n", encoding="utf-8")
    if options.plot:
        options.plot.write_text(draw_bars(measured), encoding="utf-8")
    if options.trace:
        _write_trace(network, images, options.trace)


if __name__ == "__main__":
    sys.exit(main())
