"""Seeds and random states of one process: python, numpy, torch on the CPU and on the current CUDA device.

A random state is made of plain containers and tensors only, so that it can be saved in a checkpoint that is loaded with
``weights_only``.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["get_rng_state", "seed_everything", "set_rng_state"]

logger = logging.getLogger(__name__)


def seed_everything(seed: int, *, rank: int = 0, deterministic: bool = False) -> int:
    """Seed python, numpy and torch, and choose how cuDNN picks its algorithms.

    Args:
        seed: The run's seed, the same on every process; NumPy takes 0 to 2**32 - 1, the narrowest of the three.
        rank: The process's rank; each process draws other numbers.
        deterministic: Use deterministic algorithms wherever there are some, at the cost of speed; an operation without
            one warns and still runs.

    Returns:
        The seed of this process, ``seed + rank``.

    Raises:
        ValueError: The seed of this process is negative or does not fit 32 bits.
    """
    process_seed = seed + rank
    random.seed(process_seed)
    np.random.seed(process_seed)
    torch.manual_seed(process_seed)
    if deterministic:
        # cuBLAS reads this when its first handle is made; without it matrix products on a GPU stay nondeterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    return process_seed


def get_rng_state() -> dict[str, Any]:
    """Return the random states of this process.

    Returns:
        Entries ``python``, ``numpy``, ``torch`` and ``cuda`` (of the current device; None where CUDA is not in use),
        all of plain containers and byte tensors.
    """
    generator = np.random.get_state(legacy=False)
    internal = {"key": generator["state"]["key"].tolist(), "pos": generator["state"]["pos"]}
    return {
        "python": random.getstate(),
        "numpy": {**generator, "state": internal},
        "torch": torch.get_rng_state(),
        # Asking an unused CUDA for its state would start a context on the GPU, for a run on the CPU too.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the random states that ``get_rng_state`` returned, in this process or another.

    Args:
        state: The states. A CUDA state is skipped, with a warning, on a machine without CUDA.

    Raises:
        ValueError: An entry is missing.
    """
    missing = [name for name in ("python", "numpy", "torch", "cuda") if name not in state]
    if missing:
        raise ValueError(f"the random state lacks {', '.join(missing)}; it holds {', '.join(state) or 'nothing'}")
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    generator = state["numpy"]
    key = np.array(generator["state"]["key"], dtype=np.uint32)
    np.random.set_state({**generator, "state": {**generator["state"], "key": key}})
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is None:
        return
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    else:
        logger.warning("the random state holds a CUDA state; there is no CUDA device here, so it is left out")
