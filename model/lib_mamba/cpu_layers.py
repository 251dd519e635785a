"""Where the compiled CPU kernels for layers (not scans) run.

They come with the compiled scan (`mobilemamba_kernels`), and run where it does: on a CPU, in float32; for a folded
network without gradients, for one in training within steps of autograd. On x86 processors without AMX, which are slow
in bfloat16, they compute in float32 what would be bfloat16. PyTorch runs everything else.
"""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends
from .tracing import is_exporting

__all__ = ["serve", "serve_network", "serve_training"]

logger = logging.getLogger(__name__)


def serve(x: Tensor) -> Any | None:
    """Return the namespace of the operators of a folded network if they are to run on ``x``, else None.

    torch.fx, which has something else in place of tensors, follows PyTorch's.
    """
    if (
        not isinstance(x, Tensor)
        or x.device.type != "cpu"
        or (torch.is_grad_enabled() and x.requires_grad)
        or is_exporting()
    ):
        return None
    if not _is_chosen() or not _is_for_float32(x):
        return None
    return torch.ops.mobilemamba_kernels if x.dtype == torch.float32 else _Widened()


def serve_network(x: Tensor) -> Any | None:
    """Return the namespace of the operators if one may run a whole folded network on images ``x``, else None.

    Not where something looks into the layers (as for `serve_training`), nor under autocast.
    """
    if not _is_unobserved(x) or (torch.is_grad_enabled() and x.requires_grad) or torch.is_autocast_enabled("cpu"):
        return None
    return torch.ops.mobilemamba_kernels if _is_chosen() else None


def serve_training(x: Tensor) -> bool:
    """Return whether the operators may train layers on ``x``.

    Not where something looks into the layers: torch.compile, torch.fx, torch.jit, torch.func, subclasses of tensors,
    modes that see every operator.
    """
    return _is_unobserved(x) and _is_chosen() and _is_for_float32(x)


def _is_unobserved(x: Tensor) -> bool:
    """Return whether ``x`` is a map (B, C, H, W) in float32 on the CPU, and nothing looks into the layers it passes."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() != 4 or not x.numel():
        return False
    return not torch._C._are_functorch_transforms_active()


@torch.compiler.assume_constant_result
def _is_chosen() -> bool:
    return backends.choose("cpu").name == "cpu"


def _is_for_float32(x: Tensor) -> bool:
    """Return whether a CPU is to compute in float32: when asked to, or for bfloat16 where the CPU is slow at it."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return False
    asked = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return asked == torch.float32 or (asked == torch.bfloat16 and _is_slow_in_bfloat16())


@torch.compiler.assume_constant_result
def _is_slow_in_bfloat16() -> bool:
    # Apart from the cached function, as torch.compile looks through functools.cache.
    return _lacks_matrix_unit()


@functools.cache
def _lacks_matrix_unit() -> bool:
    """Return whether this is an x86 processor without AMX: bfloat16 then makes PyTorch's layers no faster."""
    is_lacking = platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_amx_tile_supported()
    if is_lacking:
        logger.info("bfloat16 on this CPU, which has no AMX: compiled layers compute in float32")
    return is_lacking


class _Widened:
    """The operators for maps and weights in bfloat16: they compute in float32."""

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        return functools.partial(_run_widened, getattr(torch.ops.mobilemamba_kernels, name))


def _run_widened(operator: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    return operator(_widen(x), *map(_widen, arguments)).to(x.dtype)


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float()
    return [item.float() for item in value] if isinstance(value, list) else value
