"""Reading the checkpoints of mmengine without running code that they may hold.

Next to the weights of a detector or segmentor stand the histories of its log: objects of a class of mmengine's, numpy
arrays, and functions looked up by ``getattr``. These are allowed, and whatever else a file asks for is still
refused.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
import torch

__all__ = ["reading_histories"]

HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
ARRAY = "numpy.ndarray"
REBUILD = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")  # of numpy 1 and of numpy 2
LOOK_UP = ("__builtin__.getattr", "builtins.getattr")  # the first by older protocols of pickle


class _Ignored:
    """Inert: takes any arguments and any state, and keeps none."""

    def __new__(cls, *arguments: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def reading_histories(history: type | None = None) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which ``weights_only`` loads read past log histories, or make them.

    Args:
        history: mmengine's ``HistoryBuffer``, to have them made; when None, inert objects stand in their place.
    """
    array: Any = _Ignored
    rebuild: Any = _Ignored
    look_up: Any = _Ignored
    if history is not None:
        array, rebuild = np.ndarray, np.zeros(0).__reduce__()[0]
        look_up = functools.partial(_statistic, history)
    stand_ins = {HISTORY: history or _Ignored, ARRAY: array}
    stand_ins |= dict.fromkeys(REBUILD, rebuild) | dict.fromkeys(LOOK_UP, look_up)
    return torch.serialization.safe_globals([(stand_in, name) for name, stand_in in stand_ins.items()])


def _statistic(history: type, owner: Any, name: str) -> Any:
    """Stand in for `getattr`, with which a history's statistics were saved, and for nothing else of it."""
    if owner is not history or name.startswith("_"):
        raise ValueError(f"holds code: it asks for {name} of {owner}")
    return getattr(owner, name)
