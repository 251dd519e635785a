"""The choice of what runs the scans: made once per type of device, and logged in one line.

A backend is an object (a module will do) that offers::

    is_available() -> tuple[bool, str]      # with the version, or with what is missing and how to get it
    gated_scan, gated_scan_backward         # arguments and results of the operators `mobilemamba::...`, positional
    gated_scan_with_states                  # the same; where absent, gated_scan_backward gets nothing that was kept
    selective_scan, selective_scan_backward # the same; may be absent

and may answer any call with ``NotImplemented`` for inputs that it does not cover (a type, a number of states): then the
next simpler implementation runs, in the end the reference.

On a GPU a backend is tried on small inputs before it is chosen: one that fails is passed over with a warning, or, where
it was asked for by name, is an error.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import library, reference, trial

__all__ = [
    "NAMES",
    "Choice",
    "availability",
    "choose",
    "gated_scan",
    "gated_scan_backward",
    "gated_scan_with_states",
    "keeps_states",
    "selective_scan",
    "selective_scan_backward",
    "serves",
    "set_backend",
    "use_backend",
    "without_autocast",
]

logger = logging.getLogger(__name__)

REFERENCE = "reference"
NAMES = ("cuda", "triton", "cpu", REFERENCE)
# Fastest first. Any other type of device has only the reference.
_ORDER = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


@dataclass(frozen=True)
class Choice:
    """The backend of a type of device.

    Attributes:
        name: One of `NAMES`.
        backend: The object that offers the functions.
        reason: Version, and why nothing faster was taken.
    """

    name: str
    backend: Any
    reason: str


@dataclass
class _Request:
    """The backend asked for by `set_backend`; for the whole process, as backward passes run in their own threads."""

    name: str | None = None


_request = _Request()


def set_backend(name: str | None) -> None:
    """Force a backend wherever it can run; other types of device still choose for themselves.

    Args:
        name: One of `NAMES`; None chooses automatically again.

    Raises:
        ValueError: If there is no such backend, or it cannot run here.
    """
    if name is not None:
        if name not in NAMES:
            raise ValueError(f"scan backend must be one of {', '.join(NAMES)}, got {name!r}")
        is_available, reason = availability(name)
        if not is_available:
            raise ValueError(f"scan backend {name!r} was asked for but cannot run: {reason}")
    _request.name = name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend within a ``with`` block; see `set_backend`."""
    before = _request.name
    set_backend(name)
    try:
        yield
    finally:
        _request.name = before


@functools.cache
def availability(name: str) -> tuple[bool, str]:
    """Return whether a backend can run here, and its version or what is missing and how to get it."""
    try:
        backend = _load(name)
    except ImportError as error:
        return False, f"{error.name or 'a module'} is not installed (pip install {error.name})"
    return backend.is_available()


@functools.cache
def _load(name: str) -> Any:
    """Return the object behind a name. Raises ImportError where its library is not installed."""
    if name == REFERENCE:
        return _Reference
    if name == "triton":
        return import_module(".kernels.triton_scan", __package__)
    return getattr(import_module(".compiled", __package__), name)


class _Reference:
    """The plain PyTorch functions as a backend."""

    gated_scan = staticmethod(reference.gated_scan)
    gated_scan_backward = staticmethod(reference.gated_scan_backward)
    selective_scan = staticmethod(reference.selective_scan)
    selective_scan_backward = staticmethod(reference.selective_scan_backward)

    @staticmethod
    def is_available() -> tuple[bool, str]:
        return True, "plain PyTorch"


def _is_interpreting() -> bool:
    """Return whether Triton interprets its kernels in Python, on any device, orders of magnitude slower."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def serves(name: str, device_type: str) -> bool:
    """Return whether a backend is made for a type of device. Triton's interpreter runs on any."""
    if name == "triton":
        return device_type == "cuda" or _is_interpreting()
    return name in (device_type, REFERENCE)


def choose(device_type: str) -> Choice:
    """Return what runs on ``"cpu"``, ``"cuda"``, ...: the same for the whole process, unless another is forced."""
    forced = _request.name
    return _choose(device_type, forced if forced and serves(forced, device_type) else None)


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Keep what is done within out of a trace of torch.jit, which stops at operators that it has no node for."""
    tracer: Any = torch._C
    state = tracer._get_tracing_state()
    if state is None:
        yield
        return
    tracer._set_tracing_state(None)
    try:
        yield
    finally:
        tracer._set_tracing_state(state)


@functools.cache
@_untraced()
def _choose(device_type: str, forced: str | None) -> Choice:
    if forced:
        problem = _problem(forced, device_type)
        if problem:
            raise RuntimeError(f"scan backend {forced!r} was asked for, but on {device_type} it fails: {problem}")
        choice = Choice(forced, _load(forced), f"{availability(forced)[1]}, as asked for")
    else:
        choice = _first_available(device_type)
    is_slow = device_type == "cuda" and choice.name == REFERENCE
    # Whoever has nvcc and a GPU wants the CUDA kernels, and hears that they could not be built.
    is_lost = device_type == "cuda" and choice.name != "cuda" and not forced and library.cuda_errors()
    logger.log(
        logging.WARNING if is_slow or is_lost else logging.INFO,
        "scan on %s: %s backend%s (%s)",
        device_type,
        choice.name,
        ", SLOW on a GPU" if is_slow else "",
        choice.reason,
    )
    return choice


def _first_available(device_type: str) -> Choice:
    missing = ""
    for name in _ORDER.get(device_type, ()):
        is_available, reason = availability(name)
        if is_available and name == "triton" and _is_interpreting():
            is_available, reason = False, "TRITON_INTERPRET is set, which is for debugging"
        problem = _problem(name, device_type) if is_available else ""
        if problem:
            logger.warning("scan on %s: the %s backend is passed over, as it fails: %s", device_type, name, problem)
            is_available, reason = False, "fails its check"
        if is_available:
            return Choice(name, _load(name), reason + missing)
        missing += f"; {name}: {reason}"
    return Choice(REFERENCE, _load(REFERENCE), availability(REFERENCE)[1] + missing)


def _problem(name: str, device_type: str) -> str:
    """Return what is wrong with a backend on a GPU, empty if nothing; those of a CPU need no trial.

    Raises:
        RuntimeError: If the trial has left the GPU unusable for this process, so that no other backend can take over.
    """
    if device_type != "cuda" or name == REFERENCE or _is_interpreting():
        return ""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return ""  # nothing but launches may happen during a capture, before which the backend has run already
    problem = trial.problem_of(_load(name), torch.device(device_type))
    if problem and torch.cuda.is_available():
        try:
            torch.zeros(1, device=device_type).item()
        except RuntimeError as error:
            raise RuntimeError(
                f"the {name} scan backend fails and takes the GPU along ({problem}): run again with another one, "
                "model.model_kwargs.scan_backend=reference for instance"
            ) from error
    return problem


def _attempt(choice: Choice, operation: str, *arguments: Any) -> Any:
    """Return what the chosen backend returns for the call: NotImplemented where it has no function or declines."""
    function = getattr(choice.backend, operation, None)
    return NotImplemented if function is None else function(*arguments)


@functools.cache
def _warn(device_type: str, name: str, operation: str) -> None:
    """Log once that a backend does not cover a call."""
    level = logging.WARNING if device_type == "cuda" else logging.INFO
    message = "scan on %s: the %s backend does not cover such a %s, plain PyTorch runs it"
    logger.log(level, message, device_type, name, operation)


def selective_scan(x: Tensor, *arguments: Any) -> Tensor:
    """Run `mobilemamba::selective_scan` on the backend of the device of ``x``."""
    choice = choose(x.device.type)
    result = _attempt(choice, "selective_scan", x, *arguments)
    if result is NotImplemented:
        _warn(x.device.type, choice.name, "selective_scan")
        result = reference.selective_scan(x, *arguments)
    return result


def selective_scan_backward(grad: Tensor, x: Tensor, *arguments: Any) -> Any:
    """Run `mobilemamba::selective_scan_backward` on the backend of the device of ``x``."""
    choice = choose(x.device.type)
    result = _attempt(choice, "selective_scan_backward", grad, x, *arguments)
    if result is NotImplemented:
        _warn(x.device.type, choice.name, "selective_scan")
        result = reference.selective_scan_backward(grad, x, *arguments)
    return result


def gated_scan(x: Tensor, *arguments: Any) -> Tensor:
    """Run `mobilemamba::gated_scan` on the backend of the device of ``x``, in parts if it does not do it as a whole."""
    result = _attempt(choose(x.device.type), "gated_scan", x, *arguments)
    if result is NotImplemented:
        result = reference.gated_scan(x, *arguments, scan=selective_scan)
    return result


def keeps_states(device_type: str) -> bool:
    """Return whether a backend that can keeps states and statistics on a type of device for the backward pass."""
    return device_type == "cuda"


def gated_scan_with_states(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run `gated_scan`; return its result and the states and statistics that the backend has kept, or None."""
    result = _attempt(choose(x.device.type), "gated_scan_with_states", x, *arguments)
    return (gated_scan(x, *arguments), None, None) if result is NotImplemented else result


def gated_scan_backward(grad: Tensor, x: Tensor, *arguments: Any, kept: Sequence[Tensor | None] = ()) -> Any:
    """Run `mobilemamba::gated_scan_backward` on the backend of the device of ``x``, in parts as for `gated_scan`.

    ``kept`` are the states and statistics that `gated_scan_with_states` has returned.
    """
    choice = choose(x.device.type)
    own = () if getattr(choice.backend, "gated_scan_with_states", None) is None else kept
    result = _attempt(choice, "gated_scan_backward", grad, x, *arguments, *own)
    if result is NotImplemented:
        result = reference.gated_scan_backward(
            grad, x, *arguments, scan=selective_scan, scan_backward=selective_scan_backward
        )
    return result


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    """Return a context in which autocast casts nothing on a device: for what computes in float32 on purpose."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
