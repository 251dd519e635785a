"""The selective scan, its backends, the two-dimensional block around it, and the compiled kernels of other layers."""

from . import backends, cpu_layers, layouts, reference
from .backends import choose, set_backend, use_backend
from .gated_scan import gated_scan
from .selective_scan import selective_scan
from .ss2d import SCANS, SS2D

__all__ = [
    "SCANS",
    "SS2D",
    "backends",
    "choose",
    "cpu_layers",
    "gated_scan",
    "layouts",
    "reference",
    "selective_scan",
    "set_backend",
    "use_backend",
]
