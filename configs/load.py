"""From a path and overrides to a resolved configuration, and from there to a file that can be loaded again."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from .overrides import apply_overrides, set_entry
from .resolve import resolve
from .schema import Config
from .tree import nearest, to_dict
from .values import convert, entry_types

__all__ = ["load_config", "save_config"]

_REPOSITORY = Path(__file__).resolve().parent.parent
_SAVED_SUFFIXES = (".yaml", ".yml")


def load_config(path: str | Path, overrides: Sequence[str] = (), *, mode: str = "train", world_size: int = 1) -> Config:
    """Return the configuration of one run, resolved and read-only.

    Args:
        path: A Python file that holds ``def get_config() -> Config``, with or without ``.py``, or a file that
            ``save_config`` wrote; relative to the working directory, or else to the repository.
        overrides: ``path.key=value`` arguments.
        mode: train, ft, test, test_net or predict.
        world_size: Number of processes.

    Raises:
        ValueError: where the file is missing or faulty, an override does not fit or entries contradict each other.
    """
    file = _find(Path(path))
    config = _read_saved(file) if file.suffix in _SAVED_SUFFIXES else _call_get_config(file)
    config.mode = convert(mode, entry_types(Config)["mode"], "mode")
    given = apply_overrides(config, overrides)
    return resolve(config, given, world_size=world_size)


def save_config(config: Config, path: str | Path) -> None:
    """Write ``config`` as YAML; ``load_config`` reads it, and fills in again what follows from other entries."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def _find(path: Path) -> Path:
    for root in (Path.cwd(), _REPOSITORY):
        for name in (path, Path(f"{path}.py")):
            if (root / name).is_file():
                return root / name
    siblings = (path.parent / file.name for file in path.parent.glob("*") if file.suffix in (".py", *_SAVED_SUFFIXES))
    ours = (file.relative_to(_REPOSITORY) for file in _REPOSITORY.glob("configs/**/*.py") if _holds_config(file))
    names = {str(file).removesuffix(".py") for file in (*filter(_holds_config, siblings), *ours)}
    raise ValueError(
        f"{path}: there is no such config file; did you mean {nearest(str(path).removesuffix('.py'), names)!r}?"
    )


def _holds_config(file: Path) -> bool:
    return file.suffix in _SAVED_SUFFIXES or "\ndef get_config(" in file.read_text(encoding="utf-8", errors="ignore")


def _call_get_config(file: Path) -> Config:
    spec = importlib.util.spec_from_file_location(f"configs_from_file_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file}: a config file is Python (.py) or saved by an earlier run (.yaml)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # whatever the file did, the user needs to know which file
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"{file}: get_config() returned a {type(config).__name__}, not a configs.schema.Config")
    with _naming(file):
        return convert(config, Config, "")


def _read_saved(file: Path) -> Config:
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not YAML: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{file}: holds a {type(entries).__name__}, not the entries of a configuration")
    with _naming(file):
        config: Config = convert(entries, Config, "")
        for path in config.derived:
            set_entry(config, path, None)
    return config


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Put the file before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
