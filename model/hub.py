"""Networks as folders of two files, ``config.json`` and ``model.safetensors``: the form of timm and Hugging Face's hub.

Such a folder is read by `from_pretrained`, by ``timm.create_model("local-dir:<folder>", pretrained=True)``, by
transformers (``AutoModelForImageClassification.from_pretrained("<folder>")``) and, once uploaded
(``hf upload <user>/<name> <folder>``), from the hub by all three.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from .files import replacing, save_safetensors
from .mobilemamba import MobileMamba
from .mobilemamba.folded_layers import is_folded

__all__ = ["CONFIG", "WEIGHTS", "from_pretrained", "save_pretrained"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
SOURCES = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict")
TRAINING = ("drop_path", "drop_rate")  # matters of a run, not of the network


def save_pretrained(
    network: MobileMamba, folder: str | Path, *, classes: Sequence[str] = (), overwrite: bool = False
) -> Path:
    """Save a network: its weights, and what builds it again.

    Args:
        network: Built by `create_model` or timm, not folded.
        folder: Where to; made if need be.
        classes: Names of the classes, which transformers predicts by.
        overwrite: Replace what an earlier save left there.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder holds a network and ``overwrite`` is not set.
        ValueError: If the network is folded, or it is not known what builds it, or there are not as many names as
            classes.
    """
    folder = Path(folder)
    config = _config(network)
    if classes:
        if len(classes) != network.num_classes:
            raise ValueError(f"{len(classes)} names for {network.num_classes} classes: give one for each, or none")
        config["label_names"] = list(classes)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        if (folder / name).exists() and not overwrite:
            raise FileExistsError(
                f"{folder / name} exists and was left as it is: name another folder, or overwrite=True"
            )
    save_safetensors(network.state_dict(), folder / WEIGHTS)
    with replacing(folder / CONFIG) as aside:
        aside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _config(network: MobileMamba) -> dict[str, Any]:
    """Return what timm builds the network from, and what it tells of its input."""
    noted = network.default_cfg
    if not noted:
        raise ValueError("this network was built by hand, so nothing is noted that builds it again: use create_model")
    if is_folded(network):
        raise ValueError("a folded network cannot be loaded again: save it before fuse()")
    arguments = {name: value for name, value in network.model_args.items() if name not in TRAINING}
    arguments.pop("num_classes", None)  # it stands above: transformers passes both on
    current = {"in_chans": network.in_chans, "global_pool": network.global_pool}
    input_size = (network.in_chans, *noted["input_size"][1:])
    return {
        "architecture": noted["architecture"],
        "num_classes": network.num_classes,
        "num_features": network.num_features,
        "global_pool": network.global_pool,
        "model_args": {**arguments, **current},
        "pretrained_cfg": {
            **{name: value for name, value in noted.items() if name not in (*SOURCES, "architecture")},
            "num_classes": network.num_classes,
            "input_size": input_size,
            "min_input_size": (network.in_chans, *noted["min_input_size"][1:]),
        },
    }


def from_pretrained(source: str | Path, **kwargs: Any) -> nn.Module:
    """Build a network from a folder that `save_pretrained` or timm has written, or from Hugging Face's hub.

    Args:
        source: A folder, or the name ``<user>/<name>`` of a model on the hub, with ``@<revision>`` if wanted.
        **kwargs: As for `timm.create_model`: ``num_classes`` (another count starts a new head), ``in_chans``, ...

    Raises:
        FileNotFoundError: If it is neither a folder with a network nor such a name.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} holds no {CONFIG}: name a folder that save_pretrained has written")
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no folder {source}, and the name of a model on the hub is <user>/<name>")
    return timm.create_model(f"hf-hub:{source}", pretrained=True, **kwargs)
