"""Parts of a network that a run does not train: they stay bit for bit."""

from __future__ import annotations

import difflib
import logging
import re

from torch import nn

__all__ = ["FrozenParts"]

logger = logging.getLogger(__name__)


class FrozenParts:
    """Takes the gradients from parts of a network, and keeps these parts in evaluation mode while it trains.

    So their batch norms neither normalise by the batch nor update their statistics, and dropout within them is off.
    They are frozen before the average, the optimiser and the wrapper for data parallelism are built, which then leave
    them as they are.

    Args:
        network: The bare network.
        parts: Separated by commas: ``backbone`` for all but the classifier, ``stem`` for the stem by the
            network's own account, or names of modules. Empty freezes nothing.

    Raises:
        ValueError: If there is no such part, it has no parameters, or nothing is left to train.
    """

    def __init__(self, network: nn.Module, parts: str) -> None:
        names = [name for name, _ in network.named_parameters()]
        words = [word for part in parts.split(",") if (word := part.strip())]
        frozen = {name for word in words for name in _parameters_of(network, word, names)}
        for name, parameter in network.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
        if frozen and not any(parameter.requires_grad for parameter in network.parameters()):
            raise ValueError(f"model.freeze={parts} leaves nothing to train; take a part out")
        self._modules = [module for name, module in network.named_modules() if _is_within(f"{name}.", names, frozen)]
        if frozen:
            logger.info("frozen: %s, %d of %d parameter tensors", ", ".join(words), len(frozen), len(names))
        self.hold()

    def hold(self) -> None:
        """Put the frozen parts into evaluation mode; called whenever the network was put into training mode."""
        for module in self._modules:
            module.eval()


def _is_within(prefix: str, names: list[str], frozen: set[str]) -> bool:
    """Return whether a module has parameters, and all of them are frozen."""
    own = {name for name in names if name.startswith(prefix)}
    return bool(own) and own <= frozen


def _parameters_of(network: nn.Module, word: str, names: list[str]) -> list[str]:
    if word == "backbone":
        trained = _classifier_parameters(network)
        found = [name for name, parameter in network.named_parameters() if id(parameter) not in trained]
    elif word == "stem" and hasattr(network, "group_matcher"):
        patterns = network.group_matcher()["stem"]
        patterns = [patterns] if isinstance(patterns, str) else [entry[0] for entry in patterns]
        found = [name for name in names if any(re.match(pattern, name) for pattern in patterns)]
    else:
        modules = [name for name, _ in network.named_modules() if name]
        if word not in modules:
            near = difflib.get_close_matches(word, [*modules, "backbone", "stem"], n=1, cutoff=0.0)[0]
            raise ValueError(
                f"model.freeze: {type(network).__name__} has no part {word!r}; did you mean {near!r}? Its stages: "
                f"{', '.join(name for name, _ in network.named_children())}"
            )
        found = [name for name in names if name.startswith(f"{word}.")]
    if not found:
        raise ValueError(f"model.freeze: {word!r} has no parameters in {type(network).__name__}")
    return found


def _classifier_parameters(network: nn.Module) -> set[int]:
    """Return the ids of the parameters of the head, or of both heads."""
    if not hasattr(network, "get_classifier"):
        raise ValueError(
            f"model.freeze=backbone needs a network that knows its head, and {type(network).__name__} does not; "
            f"name modules: {', '.join(name for name, _ in network.named_children())}"
        )
    head = network.get_classifier()
    heads = head if isinstance(head, tuple) else (head,)
    return {id(parameter) for module in heads for parameter in module.parameters()}
