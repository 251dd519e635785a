"""Out of PyTorch: a network to a file of another runtime, run and compared with PyTorch before anyone uses it.

Nothing here is imported by the network itself, and the formats' packages only when a format is asked for.
"""

from .check import Report
from .exporting import default_request, export
from .formats import FORMATS
from .portable import Form, Portable, portable
from .request import ExportRequest

__all__ = ["FORMATS", "ExportRequest", "Form", "Portable", "Report", "default_request", "export", "portable"]
