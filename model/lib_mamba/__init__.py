"""State-space parts: the selective scan, its backends, and the two-dimensional block around it."""

from . import backends, compiled, reference
from .backends import choose, set_backend, use_backend
from .gated_scan import gated_scan
from .selective_scan import selective_scan
from .ss2d import SCANS, SS2D

__all__ = [
    "SCANS",
    "SS2D",
    "backends",
    "choose",
    "compiled",
    "gated_scan",
    "reference",
    "selective_scan",
    "set_backend",
    "use_backend",
]
