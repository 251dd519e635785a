"""PyTorch's profiler, whose traces open in Perfetto (ui.perfetto.dev) and chrome://tracing."""

from __future__ import annotations

import os

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["new_trace"]

ABOVE_ERRORS = "5"  # a level of messages


def new_trace(device: torch.device, *, record_shapes: bool = False) -> profile:
    """Return a profiler of what runs on a device and on the CPU, not started yet.

    Args:
        device: Where the network computes.
        record_shapes: Note the shapes of the operators' inputs.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    if not torch.cuda.is_available():
        # Read when the first profile starts. Without it, a PyTorch for CUDA reports the missing GPU as an error.
        os.environ.setdefault("KINETO_LOG_LEVEL", ABOVE_ERRORS)
    return profile(activities=activities, record_shapes=record_shapes, acc_events=True)
