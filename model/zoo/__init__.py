"""The released checkpoints: their names, sources and published figures, and how each becomes a verified local file."""

from .entries import Dataset, Entry, find, models_of, read_zoo, released_entry
from .fetching import fetch
from .places import local_path
from .training_state import reading_histories
from .transfer import DownloadError
from .verification import verify

__all__ = [
    "Dataset",
    "DownloadError",
    "Entry",
    "fetch",
    "find",
    "local_path",
    "models_of",
    "read_zoo",
    "reading_histories",
    "released_entry",
    "verify",
]
