"""Reading past what mmengine keeps beside the weights of a detector or segmentor.

Its checkpoints hold the histories of its log: objects of a class of its own, numpy arrays, and functions looked up by
``getattr``. None of these is wanted here, and none is made: inert objects stand in their place, and whatever else a
file asks for is refused as ever.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["ignoring_histories"]

HISTORIES = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",  # of numpy 1
    "numpy._core.multiarray._reconstruct",  # of numpy 2
    "__builtin__.getattr",  # as older protocols of pickle spell it
    "builtins.getattr",
)


class _Ignored:
    """Made of anything, and takes over nothing."""

    def __new__(cls, *arguments: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def ignoring_histories() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which ``weights_only`` loads put inert objects in the place of log histories."""
    return torch.serialization.safe_globals([(_Ignored, name) for name in HISTORIES])
