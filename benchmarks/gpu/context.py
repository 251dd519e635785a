"""What every step is given: the device, how much to do, the file of figures; and how it times something."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..common import Plan, capture, measure
from .figures import Case, Figures
from .gauges import Gauges
from .scale import FULL, SMALL

__all__ = ["COPY_CASE", "Cases", "Context", "Measured", "Settings"]

Key = TypeVar("Key", bound=Hashable)
# Each case with what returns its figures, "passed" among them where there is something to pass.
Cases = Iterator[tuple[Case, Callable[[], dict[str, Any]]]]
COPY_CASE = {"what": "copy rate"}


@dataclass(frozen=True)
class Measured:
    """Times of some runs that took turns.

    Attributes:
        seconds: Median time of each.
        gauges: Clocks, power and temperature meanwhile.
    """

    seconds: dict[Any, float]
    gauges: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a process has to be told, as JSON has it.

    Attributes:
        device: "cuda" or "cpu".
        is_small: Whether to do only a little of everything.
        run: Name of the run.
        compiler: Backend of torch.compile.
        path: The file of figures.
        folder: For files that other cases of the run use; it goes with the run.
    """

    device: str
    is_small: bool
    run: str
    compiler: str = "inductor"
    path: str = ""
    folder: str = ""


class Context:
    """What a step is given.

    Args:
        settings: As the process was told.

    Attributes:
        device: "cuda" or "cpu".
        scale: How much to do.
        figures: Where figures go.
        folder: For files that other cases use.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = settings.device
        self.scale = replace(SMALL if settings.is_small else FULL, compiler=settings.compiler)
        self.figures = Figures(Path(settings.path), settings.run)
        self.folder = Path(settings.folder)

    @property
    def is_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device == "cuda"

    @functools.cached_property
    def gauges(self) -> Gauges:
        """The GPU's gauges; none on a CPU."""
        return Gauges(str(torch.cuda.get_device_properties(0).uuid)) if self.is_cuda else Gauges(library="")

    def captured(self, run: Callable[[], Any], stream: Any = None) -> Callable[[], Any]:
        """Return what replays a call as a CUDA graph; on a CPU the call itself."""
        return capture(run, stream=stream) if self.is_cuda else run

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context with a stream of its own, for what is captured later; it yields None on a CPU."""
        return self._stream() if self.is_cuda else contextlib.nullcontext()

    @contextlib.contextmanager
    def _stream(self) -> Iterator[Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield stream
        torch.cuda.current_stream().wait_stream(stream)

    def time(self, runs: Mapping[Key, Callable[[], Any]], plan: Plan) -> Measured:
        """Let runs take turns, and return their median times."""
        gauges = self.gauges  # running before the clock does
        start = time.perf_counter()
        timings = measure(runs, plan, self.device)
        seconds = {key: timing.median for key, timing in timings.items()}
        return Measured(seconds, gauges.between(start, time.perf_counter()))

    @functools.cached_property
    def copy_rate(self) -> float:
        """Bytes that a contiguous copy reads and writes a second: as measured before, or now."""
        known = self.figures.find("environment", COPY_CASE)
        return (known or self.measure_copy())["bytes_per_s"]

    def measure_copy(self) -> dict[str, Any]:
        """Time copies of a tensor that is larger than any cache: by the driver, and by a kernel; the faster counts."""
        source = torch.zeros(self.scale.copy_bytes // 4, device=self.device)
        target = torch.empty_like(source)
        runs = {"copy": lambda: target.copy_(source), "kernel": lambda: torch.neg(source, out=target)}
        measured = self.time(runs, self.scale.plan)
        moved = 2 * source.numel() * source.element_size()
        rates = {f"{name}_bytes_per_s": moved / seconds for name, seconds in measured.seconds.items()}
        return {"bytes_per_s": max(rates.values()), **rates, "bytes": moved, "gauges": measured.gauges}

    def empty_cache(self) -> None:
        """Give cached memory of the GPU back, and start to count its peak again."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Return the peak of the GPU's allocated memory since `empty_cache`; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.is_cuda else None
