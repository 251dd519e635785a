"""Reading a checkpoint, choosing the weights in it, and putting these into a network.

A checkpoint may come from anywhere, so nothing in it is ever run: files are read with ``weights_only``, and one that
needs more than tensors and plain values is refused. A network is changed only after everything has been checked.
"""

from __future__ import annotations

import argparse
import errno
import logging
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .adapt import adapt
from .messages import listed
from .mismatch import LoadReport, Variants, compare, explain
from .other_files import check_kind
from .preparation import note_preparation, read_preparation

__all__ = [
    "LoadReport",
    "head_names",
    "load_checkpoint",
    "network_prefixes",
    "read_checkpoint",
    "select_state_dict",
]

logger = logging.getLogger(__name__)

AVERAGED = ("net_E", "state_dict_ema", "model_ema")  # where averaged weights stand: ours first, then timm's
PLAIN = ("net", "model", "state_dict", "model_state_dict", "module")  # the last is DeepSpeed's
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile
ATTRIBUTES = ("model.", "backbone.", "net.")  # prefixes of a part of Lightning's, OpenMMLab's and other models
SAFETENSORS = ".safetensors"
HEADS = ("head.l", "head_dist.l")
REFUSED_GLOBAL = re.compile(r"unsupported (?:global: )?GLOBAL (\S+)", re.IGNORECASE)


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing that it may hold is run.

    Tensors, plain values, numpy scalars and an `argparse.Namespace` of these, such as timm's ``args``, are read; a file
    that asks for anything else is refused.

    Args:
        path: A file of ``torch.save``, zipped or of before PyTorch 1.6, or a ``.safetensors`` file.
        mmap: Map the tensors of a zipped file instead of reading them. Only for a caller that copies them at once: they
            stay tied to the file.

    Raises:
        FileNotFoundError: There is no such file; the nearest names in its folder are given.
        ValueError: The path is a folder, or the file is empty, truncated, damaged, a web page, no checkpoint, or holds
            code.
    """
    path = Path(path)
    check_kind(path)
    if path.suffix.lower() == SAFETENSORS:
        return _read_safetensors(path)
    is_archive = _check_archive(path)
    checkpoint = _unpickle(path, mmap=mmap and is_archive)
    if not isinstance(checkpoint, Mapping):
        kind = type(checkpoint).__name__
        raise ValueError(f"{path} holds a {kind}, not the dictionary of a checkpoint: give a file with named weights")
    return dict(checkpoint)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file ({error}): get it again") from error


def _check_archive(path: Path) -> bool:
    """Return whether the file is a zip archive; check its contents, which ``torch.load`` itself does not."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = [Path(name).name for name in archive.namelist()]
            if "constants.pkl" in names:
                raise ValueError(f"{path} holds code (a TorchScript program) and was refused: {_way_out()}")
            # torch.save never compresses, and a few bytes could unpack to more than the memory holds.
            is_compressed = any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist())
            if "data.pkl" not in names or is_compressed:
                raise ValueError(f"{path} is a zip archive, but not a checkpoint of torch.save: name another file")
            for record in archive.infolist():
                if record.CRC:  # 0 where torch.save was told to leave the checksums out
                    _read_through(archive, record)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError, OSError) as error:
        if _is_of_machine(error):
            raise
        size = path.stat().st_size
        raise ValueError(
            f"{path} is truncated or damaged ({size:,} bytes; {error}): get it again and compare the size"
        ) from error
    return True


def _read_through(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    with archive.open(record) as file:
        while file.read(2**20):
            pass


def _unpickle(path: Path, *, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy_globals()]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # bytes of any other kind make the unpickler fail in ways that cannot be listed
        if _is_of_machine(error):
            raise
        refused = REFUSED_GLOBAL.search(str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise ValueError(
                f"{path} holds code and was refused, nothing of it was run: it asks for {refused[1]}, and a checkpoint "
                f"may hold tensors and plain values only; {_way_out()}"
            ) from error
        raise ValueError(
            f"{path} is no checkpoint of torch.save, or a damaged one ({_cause(error)}): get it again or name another"
        ) from error


def _is_of_machine(error: Exception) -> bool:
    """Return whether the machine is at fault rather than the file, which may ask for a seek to nowhere (EINVAL)."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL)


def _way_out() -> str:
    return "get only the weights from its author, or, if you trust it, load it elsewhere and save its state dict"


def _cause(error: Exception) -> str:
    # torch's own text advises loading without weights_only; the cause follows this mark.
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    return f"{type(error).__name__}: {text.strip().splitlines()[0]}" if text.strip() else type(error).__name__


def _numpy_globals() -> list[Any]:
    """Return what rebuilds a numpy scalar, as in the scores of old checkpoints, and nothing else of numpy."""
    rebuild = np.float64(0).__reduce__()[0]
    codes = "?SU" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]
    kinds = {type(np.dtype(code)) for code in codes}
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # of numpy 1 and of numpy 2
    return [*((rebuild, name) for name in names), np.dtype, *kinds]


def select_state_dict(
    checkpoint: Mapping[str, Any],
    *,
    ema: bool,
    origin: str | Path = "the checkpoint",
    prefixes: Sequence[str] = WRAPPERS,
) -> tuple[dict[str, Tensor], str]:
    """Choose the weights in a checkpoint.

    With ``ema`` the first of `AVERAGED` that the file has; without, the first of `PLAIN`, and averaged weights where it
    holds nothing else. A bare state dict is taken either way. Prefixes that all names share are removed, and logged.

    Args:
        checkpoint: What `read_checkpoint` returned.
        ema: Whether the averaged weights are wanted.
        origin: The file, for messages.
        prefixes: Prefixes to remove: those that wrappers put before every name, and also `ATTRIBUTES` where a network
            by itself is wanted. See `network_prefixes`.

    Returns:
        The weights, and the name under which they stood, or ``bare``.

    Raises:
        ValueError: There are no such weights; the entries of the checkpoint are named.
    """
    present = _sources(checkpoint)
    source = next((name for name in (AVERAGED if ema else PLAIN) if name in present), None)
    if source is None and present and not ema:
        source = present[0]
        logger.info("%s holds averaged weights only: taking %s", origin, source)
    if source is not None:
        return _bare_names(checkpoint[source], f"{origin} ({source})", prefixes), source
    if not present and any(isinstance(value, Tensor) for value in checkpoint.values()):
        return _bare_names(checkpoint, origin, prefixes), "bare"
    entries = listed(list(checkpoint), 12) or "nothing"
    if present:
        raise ValueError(
            f"{origin} holds no averaged weights ({', '.join(AVERAGED)}), only {entries}: set "
            "model.model_kwargs.ema=False to take the plain ones, or name another file"
        )
    known = ", ".join(PLAIN + AVERAGED)
    raise ValueError(f"{origin} holds no weights, only {entries}: name a file with one of {known}")


def network_prefixes(own: Iterable[str] = ()) -> list[str]:
    """Return the prefixes that names of a file may have before the network's own, given these."""
    names = list(own)
    return [prefix for prefix in (*WRAPPERS, *ATTRIBUTES) if not names or not _all_start(names, prefix)]


def _sources(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return under which names weights stand; ``model`` may also be a configuration, next to the weights."""
    present = [name for name in (*AVERAGED, *PLAIN) if isinstance(checkpoint.get(name), Mapping)]
    holding = [name for name in present if any(isinstance(value, Tensor) for value in checkpoint[name].values())]
    return holding or present


def _bare_names(weights: Mapping[Any, Any], origin: str | Path, prefixes: Sequence[str]) -> dict[str, Tensor]:
    for name, value in weights.items():
        if not isinstance(name, str):
            raise ValueError(f"{origin}: entry {name!r} is named by a {type(name).__name__}, not by a text")
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{origin}: entry {name!r} is a {kind}, not a tensor; a state dict holds tensors only")
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(f"{origin}: entry {name!r} is sparse, quantized or without data, not a plain tensor")
    names = list(weights)
    removed = ""
    while prefix := next((prefix for prefix in prefixes if names and _all_start(names, prefix)), ""):
        names = [name.removeprefix(prefix) for name in names]
        removed += prefix
    if removed:
        logger.info("%s: removed %r from the start of every name", origin, removed)
    return dict(zip(names, weights.values(), strict=True))


def _all_start(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def load_checkpoint(
    network: nn.Module,
    path: str | Path,
    *,
    checkpoint: Mapping[str, Any] | None = None,
    ema: bool = False,
    strict: bool = True,
    reset_head: bool = False,
    heads: Sequence[str] | None = None,
    name: str = "the network",
    variants: Variants | None = None,
) -> LoadReport:
    """Load a checkpoint's weights into a network, which stays untouched when this raises.

    A classifier's weights are adapted to a network without one or for other input channels; see `adapt`. What the file
    tells of the network's test transform goes into the network's ``default_cfg``.

    Args:
        network: The network, on any device.
        path: The file; see `read_checkpoint`.
        checkpoint: The file's entries, where it has been read already; it is not read again.
        ema: Take the averaged weights; see `select_state_dict`.
        strict: Refuse a file whose entries are not exactly the network's. Otherwise what fits is loaded, and what does
            not is logged as a warning.
        reset_head: Leave a head of another class count, or that the file lacks, as the network has it, freshly
            initialised, for fine-tuning.
        heads: Names of the network's classifiers; when None, those that timm notes on it, or else MobileMamba's.
        name: The network's name, for messages.
        variants: Returns the shapes of each known variant's entries; asked only to explain a mismatch.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, holds no weights, or does not fit: then every missing, unexpected and
            misshapen entry is counted, by module. Without ``strict``: nothing of it fits.
    """
    entries = read_checkpoint(path, mmap=True) if checkpoint is None else checkpoint
    preparation = read_preparation(entries, path)
    own = network.state_dict()
    weights, source = select_state_dict(entries, ema=ema, origin=path, prefixes=network_prefixes(own))
    heads = head_names(network) if heads is None else heads
    weights = adapt(weights, network, heads=heads, origin=path)
    report = compare(weights, own, source=source, reset_heads=heads if reset_head else ())
    left_out = {*report.unexpected, *report.mismatched, *report.reset}
    fitting = {entry: value for entry, value in weights.items() if entry not in left_out}
    if not report.fits:
        reasons = explain(report, weights, own, heads=heads, variants=variants)
        lines = [f"{path} ({source}) does not fit {name}.", *reasons]
        if strict or not fitting:
            raise ValueError("\n  ".join(lines))
        logger.warning("\n  ".join([*lines, f"Loaded the {len(fitting)} entries that fit."]))
    network.load_state_dict(fitting, strict=False)
    note_preparation(network, preparation)
    logger.info("%s: loaded %d entries of %s", path, len(fitting), source)
    if report.reset:
        logger.info("%s: no head of this class count; initialised again: %s", path, ", ".join(report.reset))
    return report


def head_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the classifiers: both that a MobileMamba may have, or those that timm notes on a network."""
    noted = getattr(network, "default_cfg", None) or {}
    classifier = noted.get("classifier") or HEADS
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return HEADS if set(names) <= set(HEADS) else names
