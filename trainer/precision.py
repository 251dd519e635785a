"""The number format of the network's computation, and the loss scaling that keeps small gradients from vanishing."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Trainer as TrainerConfig

__all__ = ["ApexPrecision", "Precision", "build_precision", "import_apex"]

logger = logging.getLogger(__name__)

SMALLEST_SCALE = 1.0  # a loss scale below this no longer guards against underflow: the overflow is not its doing


class Precision:
    """Autocast, and a gradient scaler for float16.

    Args:
        device: Where the network computes.
        dtype: Number format of autocast; None for full precision.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.device = device
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(device.type) if dtype is torch.float16 else None

    def __str__(self) -> str:
        if self.dtype is None:
            return "float32"
        return str(self.dtype).removeprefix("torch.") + (" with a gradient scaler" if self.scaler else "")

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make the bare network and its optimiser ready; nothing to do here."""

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of a forward pass."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, **graph: bool) -> None:
        """Add the scaled loss's gradient; ``graph`` goes to ``backward``."""
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward(**graph)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the scale out of the gradients; once, after the last backward of a step."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Do the optimiser's step with finite gradients."""
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()

    def skip(self, optimizer: torch.optim.Optimizer, *, is_overflow: bool) -> bool:
        """Skip the step.

        Args:
            optimizer: The optimiser whose gradients are not finite.
            is_overflow: Whether the loss was finite, so that the scale may have been too large; it then backs off.

        Returns:
            Whether the scale was to blame: it is not where each gradient was finite and only their norm was not.
        """
        if self.scaler is None:
            return False
        if not is_overflow or not self._overflow(optimizer).item():
            self.scaler.update(self.scaler.get_scale())
            return False
        self.scaler.update()
        return self.scaler.get_scale() >= SMALLEST_SCALE

    def can_skip_by_itself(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the device can decide whether to do a step: `step_unless`.

        Only Adam's fused forms: SGD's leaves its momentum uninitialised where the first step is skipped.
        """
        is_adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
        return is_adam and bool(getattr(optimizer, "_step_supports_amp_scaling", False))

    def step_unless(self, optimizer: torch.optim.Optimizer, is_bad_loss: torch.Tensor, is_bad: torch.Tensor) -> Tensor:
        """Do the step or skip it as the device finds, without waiting for it.

        Args:
            optimizer: One that skips by itself.
            is_bad_loss: Whether the loss of any process is not finite; a scalar on the device.
            is_bad: Whether the loss or the gradients of any process are not finite; a scalar on the device.

        Returns:
            Whether the loss scale was not to blame for a skipped step, a scalar on the device.
        """
        optimizer.grad_scale = None
        optimizer.found_inf = is_bad.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        if self.scaler is None:
            return is_bad
        state = (self.scaler._scale, self.scaler._growth_tracker)
        before = [value.clone() for value in state]
        is_left = is_bad & (is_bad_loss | ~self._overflow(optimizer))
        self.scaler.update()
        for value, old in zip(state, before, strict=True):
            value.copy_(torch.where(is_left, old, value))
        return is_left | (is_bad & (self.scaler._scale < SMALLEST_SCALE))

    def _overflow(self, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Return whether the scaler has found a gradient that is not finite; a scalar on the device."""
        found = self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
        return torch.stack([value.to(self.device) for value in found]).sum() > 0

    def state_dict(self) -> dict[str, Any] | None:
        """Return the scaler's state, None without one."""
        return None if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore a scaler's state; None, from a run without one, changes nothing."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(dict(state))


class ApexPrecision(Precision):
    """apex's mixed precision (opt level O1), which casts inside the patched functions and unscales by itself.

    Args:
        device: Where the network computes.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.amp = import_apex("apex.amp", entry="trainer.scaler", native="native")

    def __str__(self) -> str:
        return "float16 by apex"

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Patch the bare network and its optimiser, in place."""
        self.amp.initialize(network, optimizer, opt_level="O1", verbosity=0)

    def backward(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, **graph: bool) -> None:
        """Add the loss's gradient, unscaled."""
        with self.amp.scale_loss(loss, optimizer) as scaled:
            scaled.backward(**graph)

    def can_skip_by_itself(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return False: apex has to be asked."""
        return False

    def skip(self, optimizer: torch.optim.Optimizer, *, is_overflow: bool) -> bool:
        """Skip the step; apex has backed off already."""
        stash = getattr(optimizer, "_amp_stash", None)
        if getattr(stash, "already_patched", False):
            optimizer.step()  # apex has put a stand-in there, that does nothing but put the real one back
            return is_overflow
        return False

    def state_dict(self) -> dict[str, Any] | None:
        """Return apex's scalers."""
        return self.amp.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore apex's scalers."""
        if state:
            self.amp.load_state_dict(state)


def build_precision(config: TrainerConfig, device: torch.device) -> Precision:
    """Return the precision that ``trainer.scaler`` and ``trainer.amp_dtype`` name.

    float16 needs a GPU: on a CPU the run is in float32, and a log line says so.

    Raises:
        ValueError: If apex is asked for and is not installed.
    """
    if config.scaler == "none":
        return Precision(device)
    if config.scaler == "apex":
        return ApexPrecision(device)
    if device.type == "cpu" and config.amp_dtype == "float16":
        logger.info("precision: float32, since float16 needs a GPU (trainer.amp_dtype=bfloat16 works on a CPU)")
        return Precision(device)
    return Precision(device, getattr(torch, config.amp_dtype))


def import_apex(name: str, *, entry: str, native: str) -> ModuleType:
    """Return a module of apex.

    Args:
        name: The module.
        entry: The config entry that asks for it, for the message.
        native: PyTorch's own choice for the entry.

    Raises:
        ValueError: If apex, or this module of it, is not installed.
    """
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ValueError(f"{entry}=apex needs {name}, which is not installed; PyTorch's own is {entry}={native}")
    return importlib.import_module(name)
