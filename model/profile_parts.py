"""The figures of a network, part by part."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Part", "Profile"]


@dataclass(kw_only=True, slots=True)
class Part:
    """The layers of one kind in one stage.

    Attributes:
        stage: Name of the module, as in the network's ``feature_info``, or of another one at its top.
        kind: Of the layers.
        parameters: Their number.
        macs: Multiply-accumulates of the batch.
        bytes: Of the maps that they return and others keep, each once.
        seconds: Their time in a forward pass: the mean over the middle half of the passes.
        share: Of the time of all parts.
    """

    stage: str
    kind: str
    parameters: int = 0
    macs: int = 0
    bytes: int = 0
    seconds: float = 0.0
    share: float = 0.0


@dataclass(kw_only=True, slots=True)
class Profile:
    """A network in parts.

    Attributes:
        network: Its name.
        images: Shape of the batch (B, C, H, W).
        device: Where it was measured.
        seconds: Time of a forward pass that is left alone, the mean of the middle half.
        parts: In the order of the network.
    """

    network: str
    images: tuple[int, ...]
    device: str
    seconds: float
    parts: list[Part] = field(default_factory=list)

    def sums(self, key: str) -> list[Part]:
        """Return the parts added up by ``stage`` or by ``kind``; the other one is "all"."""
        sums: dict[str, Part] = {}
        for part in self.parts:
            name = getattr(part, key)
            total = sums.setdefault(name, Part(**{"stage": "all", "kind": "all", key: name}))
            for entry in ("parameters", "macs", "bytes", "seconds", "share"):
                setattr(total, entry, getattr(total, entry) + getattr(part, entry))
        return list(sums.values())
