"""The compiled kernels for layers on a CPU: when they run, and what they give a tracer.

They come with the compiled scan (`mobilemamba_kernels`), and run where it does: on a CPU, in float32; for a folded
network without gradients, for one in training within steps of autograd. On x86 processors without AMX, which are slow
in bfloat16, they run in float32 what would be bfloat16. Everything else is PyTorch's.
"""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends

__all__ = [
    "depthwise_taps",
    "layer_kernels",
    "pack_columns",
    "register_fakes",
    "serve_training",
]

logger = logging.getLogger(__name__)

COLUMNS = 16  # of whole vectors of any processor


def layer_kernels(x: Tensor) -> Any | None:
    """Return the namespace of the operators if they are to run on ``x``, else None."""
    if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_exporting():
        return None
    if not _is_chosen() or not _is_for_float32(x):
        return None
    return torch.ops.mobilemamba_kernels if x.dtype == torch.float32 else _Widened()


def _is_for_float32(x: Tensor) -> bool:
    """Return whether a CPU is to compute in float32: it is asked to, or for bfloat16, at which this one is slow."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return False
    asked = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return asked == torch.float32 or (asked == torch.bfloat16 and _is_slow_in_bfloat16())


@torch.compiler.assume_constant_result
def _is_slow_in_bfloat16() -> bool:
    # Apart from what is kept, as torch.compile looks through functools.cache into the function.
    return _lacks_matrix_unit()


@functools.cache
def _lacks_matrix_unit() -> bool:
    """Return whether this is an x86 processor without AMX, whose bfloat16 products bring PyTorch's layers no gain."""
    is_lacking = platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_amx_tile_supported()
    if is_lacking:
        logger.info("bfloat16 on this CPU, which has no AMX: compiled layers compute in float32")
    return is_lacking


class _Widened:
    """The operators on maps, and weights, in bfloat16: they compute in float32."""

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        return functools.partial(_run_widened, getattr(torch.ops.mobilemamba_kernels, name))


def _run_widened(operator: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    return operator(_widen(x), *map(_widen, arguments)).to(x.dtype)


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float()
    return [item.float() for item in value] if isinstance(value, list) else value


def serve_training(x: Tensor) -> bool:
    """Return whether layers may be trained by the operators on ``x``.

    They are not for what looks into the layers: torch.compile, torch.fx, torch.jit, torch.func, subclasses of tensors,
    modes that see every operator.
    """
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() != 4 or not x.numel():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return _is_chosen() and _is_for_float32(x)


@torch.compiler.assume_constant_result
def _is_chosen() -> bool:
    return backends.choose("cpu").name == "cpu"


def pack_columns(weight: Tensor) -> Tensor:
    """Return a matrix (K, N) as the kernels read it (`Weight` in csrc/cpu_kernel.h).

    The columns, padded by zeros to N' in whole vectors, lie in panels one behind the other: (K, 48) each, the last ones
    (K, 32) or (K, 16). Together they are (K * N',).
    """
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % COLUMNS))
    sizes, left = [], padded.shape[1] // COLUMNS
    while left:
        sizes.append(1 if left == 1 else 2 if left in (2, 4) else 3)
        left -= sizes[-1]
    return torch.cat([panel.flatten() for panel in padded.split([size * COLUMNS for size in sizes], dim=1)])


def depthwise_taps(weight: Tensor) -> Tensor:
    """Return a depthwise weight (C, 1, H, W) as the kernels read it, (H, W, C)."""
    return weight.squeeze(1).permute(1, 2, 0).contiguous()


def _new_map(x: Tensor, channels: int, height: Any, width: Any) -> Tensor:
    return x.new_empty((x.shape[0], channels, height, width)).contiguous(memory_format=torch.channels_last)


def _convolved(x: Tensor, channels: int, side: int, stride: int, padding: int) -> Tensor:
    height, width = ((size + 2 * padding - side) // stride + 1 for size in x.shape[2:])
    return _new_map(x, channels, height, width)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    return _new_map(x, bias.shape[0], *x.shape[2:])


def _ffn(x: Tensor, *weights: Tensor | None) -> Tensor:
    return _new_map(x, *x.shape[1:])


def _convs(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], side: int, stride: int, padding: int
) -> Tensor:
    for bias in biases:
        x = _convolved(x, bias.shape[0], side, stride, padding)
    return x


def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: int,
    activation: int,
) -> Tensor:
    return _convolved(x, x.shape[1], weight.shape[0], stride, padding)


def _wavelet(x: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    return _new_map(x, *x.shape[1:])


def register_fakes() -> None:
    """Tell torch.compile the shapes that the operators give. Once: the library may have been loaded before."""
    fakes: dict[str, Callable[..., Tensor]] = {
        "pointwise": _pointwise,
        "ffn": _ffn,
        "convs": _convs,
        "depthwise": _depthwise,
        "wavelet": _wavelet,
    }
    for name, fake in fakes.items():
        operator = f"mobilemamba_kernels::{name}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "Meta"):
            torch.library.register_fake(operator, fake)
