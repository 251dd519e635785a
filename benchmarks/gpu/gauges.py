"""Clocks, power and temperature of the GPU while something is timed, read from NVML, the library below nvidia-smi."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time

__all__ = ["Gauges"]

LIBRARY = "libnvidia-ml.so.1"
_SM, _MEMORY = 1, 2  # nvmlClockType_t
_CORE = 0  # nvmlTemperatureSensors_t
INTERVAL = 0.05  # seconds


class Gauges:
    """Samples the gauges in a thread of its own. Without NVML there are none, and nothing fails.

    Args:
        uuid: The GPU's, as PyTorch gives it; the first GPU where NVML does not know it, or it is empty.
        library: NVML.
    """

    def __init__(self, uuid: str = "", *, library: str = LIBRARY) -> None:
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._handle = ctypes.c_void_p()
        self._is_there = False
        try:
            self._nvml = ctypes.CDLL(library)
            self._is_there = self._nvml.nvmlInit_v2() == 0 and self._find(uuid)
        except (OSError, AttributeError):
            return
        if self._is_there:
            threading.Thread(target=self._sample, daemon=True).start()

    def between(self, start: float, end: float) -> dict[str, list[float]]:
        """Return the smallest, middle and largest reading of each gauge, rounded.

        Args:
            start: Of `time.perf_counter`.
            end: The same.

        Returns:
            By name with unit, ``sm_mhz`` for instance, without those that the GPU does not have; empty without NVML.
        """
        if not self._is_there:
            return {}
        readings = [values for moment, values in list(self._samples) if start <= moment <= end]
        readings = readings or [self._read()]
        columns = {name: [values[name] for values in readings if name in values] for name in readings[0]}
        return {
            name: [round(pick(values), 1) for pick in (min, statistics.median, max)] for name, values in columns.items()
        }

    def _find(self, uuid: str) -> bool:
        handle = ctypes.byref(self._handle)
        name = (uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}").encode()
        if uuid and self._nvml.nvmlDeviceGetHandleByUUID(name, handle) == 0:
            return True
        return self._nvml.nvmlDeviceGetHandleByIndex_v2(0, handle) == 0

    def _sample(self) -> None:
        while True:
            self._samples.append((time.perf_counter(), self._read()))
            time.sleep(INTERVAL)

    def _read(self) -> dict[str, float]:
        read = {
            "sm_mhz": self._number("nvmlDeviceGetClockInfo", _SM),
            "memory_mhz": self._number("nvmlDeviceGetClockInfo", _MEMORY),
            "power_w": self._number("nvmlDeviceGetPowerUsage", scale=1e-3),
            "celsius": self._number("nvmlDeviceGetTemperature", _CORE),
        }
        return {name: value for name, value in read.items() if value is not None}

    def _number(self, function: str, *arguments: int, scale: float = 1.0) -> float | None:
        value = ctypes.c_uint()
        status = getattr(self._nvml, function)(self._handle, *arguments, ctypes.byref(value))
        return scale * value.value if status == 0 else None
