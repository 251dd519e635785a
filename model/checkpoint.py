"""Reading a checkpoint, choosing the weights in it, and putting these into a network.

A checkpoint may come from anywhere, so nothing in it is ever run: files are read with ``weights_only``, and one that
needs more than tensors and plain values is refused. A network is changed only after everything has been checked.
"""

from __future__ import annotations

import errno
import html
import logging
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .messages import listed, neighbours
from .mismatch import LoadReport, Variants, compare, explain

__all__ = [
    "LoadReport",
    "head_names",
    "load_checkpoint",
    "read_checkpoint",
    "select_state_dict",
    "web_page_title",
]

logger = logging.getLogger(__name__)

AVERAGED = ("net_E", "state_dict_ema", "model_ema")  # where averaged weights stand: ours first, then timm's
PLAIN = ("net", "model", "state_dict")
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile
HEADS = ("head.l", "head_dist.l")
OTHER_FILES = (  # offset, bytes found there, what the file then is
    (0, b"\x1f\x8b", "a gzip archive: unpack it and name the file inside"),
    (257, b"ustar", "a tar archive: unpack it and name the file inside"),
    (0, b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
)
REFUSED_GLOBAL = re.compile(r"unsupported (?:global: )?GLOBAL (\S+)", re.IGNORECASE)


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing else that it may hold than tensors and plain values is run.

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
    _check_file(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    is_archive = _check_archive(path)
    checkpoint = _unpickle(path, mmap=mmap and is_archive)
    if not isinstance(checkpoint, Mapping):
        kind = type(checkpoint).__name__
        raise ValueError(f"{path} holds a {kind}, not the dictionary of a checkpoint: give a file with named weights")
    return dict(checkpoint)


def _check_file(path: Path) -> None:
    if path.is_dir():
        files = listed(sorted(file.name for file in path.iterdir() if file.is_file())) or "nothing"
        raise ValueError(f"{path} is a folder, not a checkpoint: name a file in it (it holds {files})")
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; {neighbours(path)}")
    with path.open("rb") as file:
        start = file.read(2048)
    if not start:
        raise ValueError(f"{path} is empty: the download or copy of it failed; get it again")
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        title = web_page_title(start)
        shown = f" ({title!r})" if title else ""
        raise ValueError(
            f"{path} is a web page{shown}, not a checkpoint: the server sent a page in place of the file, as it does "
            "when a download quota is used up or a confirmation is asked for; download it again, later or in a browser"
        )
    for offset, magic, kind in OTHER_FILES:
        if start[offset:].startswith(magic):
            raise ValueError(f"{path} is {kind}")


def web_page_title(start: bytes) -> str:
    """Return the title of a web page, given its first bytes; empty where it has none."""
    title = re.search(r"<title[^>]*>(.*?)</title>", start.decode(errors="replace"), re.IGNORECASE | re.DOTALL)
    return html.unescape(title[1]).strip() if title else ""


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
            if "data.pkl" not in names:
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
        with torch.serialization.safe_globals(_numpy_globals()):
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
    checkpoint: Mapping[str, Any], *, ema: bool, origin: str | Path = "the checkpoint"
) -> tuple[dict[str, Tensor], str]:
    """Choose the weights in a checkpoint.

    With ``ema`` the first of ``net_E``, ``state_dict_ema``, ``model_ema``; without, the first of ``net``, ``model``,
    ``state_dict``, and averaged weights where a file holds nothing else. A bare state dict is taken either way.
    Prefixes that wrappers put before every name are removed.

    Args:
        checkpoint: What `read_checkpoint` returned.
        ema: Whether the averaged weights are wanted.
        origin: The file, for messages.

    Returns:
        The weights, and the name under which they stood, or ``bare``.

    Raises:
        ValueError: There are no such weights; the entries of the checkpoint are named.
    """
    present = [name for name in (*AVERAGED, *PLAIN) if isinstance(checkpoint.get(name), Mapping)]
    source = next((name for name in (AVERAGED if ema else PLAIN) if name in present), None)
    if source is None and present and not ema:
        source = present[0]
        logger.info("%s holds averaged weights only: taking %s", origin, source)
    if source is not None:
        return _bare_names(checkpoint[source], f"{origin} ({source})"), source
    if not present and any(isinstance(value, Tensor) for value in checkpoint.values()):
        return _bare_names(checkpoint, origin), "bare"
    entries = listed(list(checkpoint), 12) or "nothing"
    if present:
        raise ValueError(
            f"{origin} holds no averaged weights ({', '.join(AVERAGED)}), only {entries}: set "
            "model.model_kwargs.ema=False to take the plain ones, or name another file"
        )
    known = ", ".join(PLAIN + AVERAGED)
    raise ValueError(f"{origin} holds no weights, only {entries}: name a file with one of {known}")


def _bare_names(weights: Mapping[str, Any], origin: str | Path) -> dict[str, Tensor]:
    odd = next((name for name, value in weights.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        kind = type(weights[odd]).__name__
        raise ValueError(f"{origin}: entry {odd!r} is a {kind}, not a tensor; a state dict holds tensors only")
    names = list(weights)
    while names and (prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in names)), None)):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, weights.values(), strict=True))


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

    Args:
        network: The network, on any device.
        path: The file; see `read_checkpoint`.
        checkpoint: The file's entries, where it has been read already; it is not read again.
        ema: Take the averaged weights; see `select_state_dict`.
        strict: Refuse a file whose entries are not exactly the network's. Otherwise what fits is loaded, and what does
            not is logged as a warning.
        reset_head: Leave a head of another class count as the network has it, freshly initialised, for fine-tuning.
        heads: Names of the network's classifiers; when None, those that timm notes on it, or else MobileMamba's.
        name: The network's name, for messages.
        variants: Returns the shapes of each known variant's entries; asked only to explain a mismatch.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, holds no weights, or does not fit: then every missing, unexpected and
            misshapen entry is counted, by module. Without ``strict``: nothing of it fits.
    """
    entries = read_checkpoint(path, mmap=True) if checkpoint is None else checkpoint
    weights, source = select_state_dict(entries, ema=ema, origin=path)
    own = network.state_dict()
    heads = head_names(network) if heads is None else heads
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
    logger.info("%s: loaded %d entries of %s", path, len(fitting), source)
    if report.reset:
        logger.info("%s: the head has another class count and is initialised again: %s", path, ", ".join(report.reset))
    return report


def head_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the classifiers, MobileMamba's or those that timm notes on its networks."""
    noted = getattr(network, "default_cfg", None) or {}
    classifier = noted.get("classifier") or HEADS
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)
