"""The run to resume: whether its configuration is the present one, and the newest such run of a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from configs import Config, to_dict

from .checkpoint import LATEST
from .run_folder import RunLock

__all__ = ["AUTO", "changed_entries", "newest_run", "unsaved_run"]

logger = logging.getLogger(__name__)

AUTO = "auto"  # of trainer.resume_dir
CONFIG = "config.yaml"  # in a run's folder

# How entries begin: those on the resume itself, and those in which the saved run may differ. The numbers of images are
# compared by `check_resumable`.
OF_THE_RESUME = ("trainer.resume_", "trainer.checkpoint", "derived")
MAY_DIFFER = (
    "batch_size",
    "logging",
    "trainer.accumulation_steps",
    "trainer.async_save",
    "trainer.data",
    "trainer.device",
    "trainer.keep_checkpoints",
    "trainer.profile",
    "trainer.save_per",
    "trainer.timeout_seconds",
)


def newest_run(config: Config) -> Path | None:
    """Return the newest run of a configuration that can be resumed; only for the one process that writes.

    It is one in ``trainer.checkpoint`` that has a latest checkpoint, is in use by no other process, and has the same
    entries, apart from those on batches, logs, the device and how often to save. One that is finished counts too, so
    that a restart does not start it again.
    """
    # Checkpoints' times are those of saves; a run's name only says when it started.
    return _first_of(config, _by_time(config, LATEST))


def unsaved_run(config: Config) -> Path | None:
    """Return the folder of the newest run of a configuration that ended before its first checkpoint.

    It is in use by no other process. A run writes its configuration when it holds its folder, so that none which is
    about to start is taken for one that ended.
    """
    return _first_of(config, [folder for folder in _by_time(config, CONFIG) if not _has_checkpoint(folder)])


def _by_time(config: Config, name: str) -> list[Path]:
    """Return the folders in ``trainer.checkpoint`` that hold a file of this name, that with the newest one first."""
    parent = Path(config.trainer.checkpoint)
    files = [*parent.glob(f"*/{name}")] if parent.is_dir() else []
    return [file.parent for file in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)]


def _first_of(config: Config, folders: Iterable[Path]) -> Path | None:
    return next((folder for folder in folders if _is_of(folder, config) and _is_free(folder)), None)


def _has_checkpoint(folder: Path) -> bool:
    return (folder / LATEST).exists() or any(folder.glob("ckpt_*.pth"))


def _is_of(folder: Path, config: Config) -> bool:
    try:
        saved = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    if not isinstance(saved, dict):
        return False
    current = to_dict(config)
    derived = {*(saved.get("derived") or ()), *current["derived"]}
    return not [
        path for path, *_ in changed_entries(saved, current) if path not in derived and not path.startswith(MAY_DIFFER)
    ]


def _is_free(folder: Path) -> bool:
    try:
        RunLock(folder).release()
    except (ValueError, OSError) as error:
        logger.info("trainer.resume_dir=%s passes over %s: %s", AUTO, folder, error)
        return False
    return True


def changed_entries(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield path, value before and value now of each entry that has changed, other than those on the resume itself.

    Entries that only one of the two configurations has are passed over.
    """
    before, now = _flatten(saved), _flatten(current)
    for path, value in now.items():
        if path in before and before[path] != value and not path.startswith(OF_THE_RESUME):
            yield path, before[path], value


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, (dict, list)):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat = {}
    for key, value in items:
        flat.update(_flatten(value, f"{path}.{key}" if path else str(key)))
    return flat
