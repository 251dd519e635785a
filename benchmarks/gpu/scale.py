"""How much of everything a report does: all of it on a GPU, a little of each on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model import list_models

from ..common import Plan

__all__ = ["B1", "B4", "FULL", "S6", "SMALL", "T2", "Scale"]

T2, S6, B1, B4 = (f"MobileMamba_{name}" for name in ("T2", "S6", "B1", "B4"))
_PLAN = Plan(warmup=0.1, seconds=0.5, runs=20, turns=4)
_SHORT_PLAN = Plan(warmup=0.02, seconds=0.2, runs=20, turns=2, sample=2e-3)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything.

    Attributes:
        networks: Variants, the most wanted first; the scan is checked and timed at all their calls.
        more_networks: Variants that are timed last.
        few_networks: Variants whose latency and training are measured.
        peers: Networks of timm to compare with.
        size: Side of the images, in pixels; None: each network's own.
        batch: Images at a time.
        other_batches: Numbers of images at which the scan is timed too.
        checked_batches: Numbers of images at which the scan is checked.
        train_batch: Images of a training step.
        train_steps: Steps over which the loss must fall.
        precisions: Number formats in which the scan is checked, of `scan.DTYPES`.
        triton_lengths: Sequence lengths at which Triton's kernels are checked and timed.
        parity_cases: Of the parity kit.
        sanitizer_shapes: (D, L, R) under the sanitizer.
        epochs: Length of the runs on handwritten digits.
        plan: How long a network is timed.
        short_plan: How long a call of the scan is timed.
        copy_bytes: Size of the tensors whose copy gives the memory's rate.
        compiler: Backend of torch.compile.
    """

    networks: Sequence[str] = (T2, B1, S6, B4)
    more_networks: Sequence[str] = tuple(name for name in list_models() if name not in (T2, B1, S6, B4))
    few_networks: Sequence[str] = (T2, B1)
    peers: Sequence[str] = (
        "mobilenetv4_conv_medium",
        "shvit_s4",
        "efficientvit_m5",
        "shvit_s3",
        "repvit_m1_0",
        "mobilenetv4_conv_small",
    )
    size: int | None = None
    batch: int = 256
    other_batches: Sequence[int] = (128, 64, 1)
    checked_batches: Sequence[int] = (256, 128, 1)
    train_batch: int = 128
    train_steps: int = 15
    precisions: Sequence[str] = ("bf16", "fp16", "fp32")
    triton_lengths: Sequence[int] = (9, 36, 144, 256)
    parity_cases: Sequence[str] = ("T2_1x160x224_seed1", "B1_1x256x256_seed0")
    sanitizer_shapes: Sequence[tuple[int, int, int]] = ((96, 20, 3), (416, 100, 13), (544, 20, 17))
    epochs: int = 4
    plan: Plan = _PLAN
    short_plan: Plan = _SHORT_PLAN
    copy_bytes: int = 2**31
    compiler: str = "inductor"


FULL = Scale()
SMALL = Scale(
    networks=(T2,),
    more_networks=(),
    few_networks=(T2,),
    peers=("mobilenetv4_conv_small",),
    size=64,
    batch=2,
    other_batches=(1,),
    checked_batches=(3, 1),
    train_batch=2,
    train_steps=3,
    triton_lengths=(9,),
    parity_cases=("T2_1x160x224_seed1",),
    sanitizer_shapes=((32, 20, 3),),
    epochs=2,
    plan=Plan(warmup=0.0, seconds=0.05, runs=2, turns=1),
    short_plan=Plan(warmup=0.0, seconds=0.05, runs=2, turns=1),
    copy_bytes=2**24,
)
