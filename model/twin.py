"""One set of operators per process, though this code may be imported under two names.

It is `model` in the repository and `mobilemamba` where it is installed, and a process may import both. Operators of
torch.library, the choice of what runs them and the entry points of timm belong to the process: the package that is
imported second takes the modules with these from the first. Networks, and all else, exist once in each.

Importing this module does so; it has to come before those modules.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .version import __version__

__all__ = ["NAMES", "SHARED"]

NAMES = ("model", "mobilemamba")
# None of them defines a class of nn.Module: a network of one package holds no part of the other's.
SHARED = (
    "lib_mamba.reference",
    "lib_mamba.trial",
    "lib_mamba.library",
    "lib_mamba.backends",
    "lib_mamba.layouts",
    "lib_mamba.cpu_layers",
    "lib_mamba.selective_scan",
    "lib_mamba.gated_scan",
    "timm_models",
)


def _share(own: str) -> None:
    """Take the shared modules over from the other package, where that has been imported.

    Raises:
        ImportError: If it is of another version.
    """
    for twin in NAMES:
        modules = {name: sys.modules.get(f"{twin}.{name}") for name in SHARED}
        if twin == own or None in modules.values():  # a package of someone else's may be called `model`
            continue
        version = sys.modules[f"{twin}.version"]
        if version.__version__ != __version__:
            places = f"{own} {__version__} ({Path(__file__).parent}) and {twin} {version.__version__}"
            raise ImportError(
                f"{places} ({Path(str(version.__file__)).parent}) register the same operators and cannot share a "
                "process: import one of them, or install the other's version"
            )
        sys.modules.update({f"{own}.{name}": module for name, module in modules.items() if module is not None})


_share(str(__package__))
