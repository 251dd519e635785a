"""Compiles beforehand, in parallel processes, what later steps compile: their caches on the disk then hold it."""

from __future__ import annotations

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from model.lib_mamba import backends, use_backend

from .. import scan
from .checks import value_and_gradients
from .context import Cases, Context, Settings
from .networks import Prepared
from .scans import triton_calls
from .training import training_step

__all__ = ["compilation"]

MAX_PROCESSES = 6  # each has its own share of the GPU's memory
TRITON_BATCH = 2  # kernels do not depend on it


def compilation(context: Context) -> Cases:
    """Compile the timed networks, the training steps and the Triton kernels."""
    scale = context.scale
    jobs: list[tuple[dict[str, Any], Any]] = []
    for name in scale.networks:
        jobs.append(({"network": name, "batch": scale.batch}, functools.partial(_network, name, scale.batch)))
    for call in triton_calls(context):
        jobs.append(({"triton": call.length, "D": call.channels}, functools.partial(_triton, call)))
    for name in scale.few_networks:
        jobs.append(({"training": name}, functools.partial(_training, name)))
        jobs.append(({"network": name, "batch": 1}, functools.partial(_network, name, 1)))
    for name in scale.peers[:2]:
        jobs.append(({"network": name, "batch": scale.batch}, functools.partial(_network, name, scale.batch)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_processes = max(1, min(MAX_PROCESSES, cores // 2, len(jobs)))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores // num_processes)))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=spawn) as pool:
        results = [(case, pool.submit(_run, job, context.settings)) for case, job in jobs]
        for case, result in results:
            yield case, result.result


def _run(job: Any, settings: Settings) -> dict[str, Any]:
    job(Context(settings))
    return {}


def _network(name: str, batch: int, context: Context) -> None:
    Prepared(context, name, batch, "bf16" if context.is_cuda else "fp32").run("channels_last", "compile")


def _training(name: str, context: Context) -> None:
    for dtype in ("float16", "bfloat16"):
        training_step(context, name, dtype, is_compiled=True).step()


def _triton(call: scan.Call, context: Context) -> None:
    with use_backend("triton" if context.is_cuda else backends.REFERENCE):
        tensors = scan.core_arguments(call, TRITON_BATCH, scan.DTYPES["bf16"], context.device)
        value_and_gradients(tensors, tensors[0])
