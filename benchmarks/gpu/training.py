"""Training steps: their speed and memory, a loss that falls, and a process group of one."""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from model import create_model
from util.distributed import Process

from .context import Cases, Context
from .networks import kernels_of
from .scale import B1, T2

__all__ = ["process_group", "training", "training_step"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
AIMS = {B1: 3_000}  # images/s on one H200
NUM_CLASSES = 1000


@dataclass
class Training:
    """A network in training on the same made-up images, in autocast.

    Attributes:
        step: Does one step, and returns its loss, still on the device.
        scaler: Of float16's loss.
        batch: Images a step.
    """

    step: Callable[[], torch.Tensor]
    scaler: torch.amp.GradScaler
    batch: int


def training_step(context: Context, variant: str, dtype: str, *, is_compiled: bool) -> Training:
    """Return a network in training: forward, cross-entropy, backward, a fused AdamW, as the trainer has them."""
    torch.compiler.reset()
    torch.manual_seed(0)
    device, batch = context.device, context.scale.train_batch
    network = create_model(variant, num_classes=NUM_CLASSES).to(device, memory_format=torch.channels_last).train()
    call = torch.compile(network, backend=context.scale.compiler) if is_compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    # On a CPU, autocast has bfloat16 only; float16 is then float32, as in the trainer.
    is_cast = context.is_cuda or dtype == "bfloat16"
    scaler = torch.amp.GradScaler(device, enabled=dtype == "float16")
    size = context.scale.size or network.img_size
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(NUM_CLASSES, (batch,), device=device)

    def step() -> torch.Tensor:
        with torch.autocast(device, dtype=DTYPES[dtype], enabled=is_cast):
            loss = F.cross_entropy(call(images), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Training(step, scaler, batch)


def training(context: Context) -> Cases:
    """Train a little in float16 and bfloat16, eager and compiled, then time the steps."""
    for variant, mode, dtype in itertools.product(context.scale.few_networks, ("eager", "compile"), DTYPES):
        case = {"network": variant, "batch": context.scale.train_batch, "dtype": dtype, "mode": mode}
        yield case, functools.partial(_train, context, variant, dtype, mode)
    case = {"network": T2, "batch": context.scale.train_batch, "what": "kernels of a step"}
    yield case, functools.partial(_profile, context)


def _train(context: Context, variant: str, dtype: str, mode: str) -> dict[str, Any]:
    context.empty_cache()
    trained = training_step(context, variant, dtype, is_compiled=mode == "compile")
    losses = torch.stack([trained.step() for _ in range(context.scale.train_steps)]).tolist()
    measured = context.time({"step": trained.step}, context.scale.plan)
    rate = trained.batch / measured.seconds["step"]
    return {
        "seconds": measured.seconds["step"],
        "images_per_s": rate,
        "peak_bytes": context.peak_bytes(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "loss_scale": trained.scaler.get_scale(),
        "gauges": measured.gauges,
        "aim_images_per_s": None if context.settings.is_small else AIMS.get(variant),
        "passed": all(map(math.isfinite, losses)) and losses[-1] < losses[0] and trained.scaler.get_scale() >= 1,
    }


def _profile(context: Context) -> dict[str, Any]:
    # Many CPUs take bfloat16's grouped convolutions channel by channel: a million events, which fill the memory.
    trained = training_step(context, T2, "bfloat16" if context.is_cuda else "float16", is_compiled=False)
    return kernels_of(trained.step, context)


class _GroupOfOne(Process):
    """A process that asks its group, though it is alone in it."""

    @property
    def is_distributed(self) -> bool:
        """Always: every collective is really called."""
        return True


def process_group(context: Context) -> Cases:
    """Exchange with a group of one: every collective of the trainer, then a step with DistributedDataParallel."""
    backend = "nccl" if context.is_cuda else "gloo"
    checks = {"collectives": _collectives, "DistributedDataParallel": _parallel_step}
    for name, check in checks.items():
        yield {"group": backend, "check": name}, functools.partial(_in_group, backend, check, context)


def _in_group(backend: str, check: Callable[[Process, Context], dict[str, Any]], context: Context) -> dict[str, Any]:
    device = torch.device(context.device, 0) if context.is_cuda else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/group"
        own = device if context.is_cuda else None
        dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1, device_id=own)
        try:
            return check(_GroupOfOne(device=device, backend=backend), context)
        finally:
            dist.destroy_process_group()


def _collectives(process: Process, context: Context) -> dict[str, Any]:
    ones = torch.ones(3, device=process.device)
    found = {
        "sum": process.sum([1, 2.5]) == [1.0, 2.5],
        "sum_tensor": process.sum_tensor(ones.clone()).tolist() == [1.0] * 3,
        "broadcast_tensor": process.broadcast_tensor(ones.clone()).tolist() == [1.0] * 3,
        "broadcast_object": process.broadcast_object({"mine": 1}) == {"mine": 1},
        "gather_objects": process.gather_objects("mine") == ["mine"],
        "on_first": process.on_first(lambda: 7) == 7,
    }
    return {**found, "passed": all(found.values())}


def _parallel_step(process: Process, context: Context) -> dict[str, Any]:
    model = create_model(T2, num_classes=4).to(process.device).train()
    if context.is_cuda:  # which these norms need
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    devices = [process.device.index] if context.is_cuda else None
    parallel = DistributedDataParallel(model, device_ids=devices)
    with torch.autocast(context.device, dtype=torch.bfloat16, enabled=context.is_cuda):
        loss = parallel(torch.randn(2, 3, 64, 64, device=process.device)).square().mean()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    is_finite = all(gradient.isfinite().all().item() for gradient in gradients)
    return {"gradients": len(gradients), "passed": is_finite and bool(gradients)}
