"""Where a network looks: class-activation maps by pytorch-grad-cam, laid over what the network was shown."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from configs import Config
from configs.schema import Normalize
from data import build_transform

__all__ = ["Explainer", "check_library", "find_layer"]

MIN_CELLS = 6  # a coarser map says little about places


def check_library() -> None:
    """Raise a ValueError if pytorch-grad-cam is not installed."""
    if importlib.util.find_spec("pytorch_grad_cam") is None:
        raise ValueError("predict.explain=true needs pytorch-grad-cam: pip install grad-cam")


def find_layer(network: nn.Module, side: int) -> nn.Module:
    """Return the last layer of the deepest stage whose map still has 6 x 6 cells, or else of the first stage.

    Args:
        network: One whose ``feature_info`` names its stages, as timm's and ours do.
        side: Of the input, in pixels.

    Raises:
        ValueError: If the network names no stages.
    """
    infos = [info for info in getattr(network, "feature_info", ()) if isinstance(info, Mapping) and info.get("module")]
    if not infos:
        raise ValueError(
            f"predict.explain=true needs a network that names its stages; {type(network).__name__} does not"
        )
    detailed = [info for info in infos if math.ceil(side / info["reduction"]) >= MIN_CELLS]
    stage = network.get_submodule((detailed or infos[:1])[-1]["module"])
    return stage[-1] if isinstance(stage, nn.Sequential) and len(stage) else stage


class Explainer:
    """Draws where a network looks, by Grad-CAM (Selvaraju et al., arXiv 1610.02391).

    Args:
        network: In evaluation mode, on its device; its parameters need no gradients afterwards.
        config: The resolved run, for the images' pipeline.

    Raises:
        ValueError: If pytorch-grad-cam is missing, or the network names no stages.
    """

    def __init__(self, network: nn.Module, config: Config) -> None:
        check_library()
        self.network = network.requires_grad_(False)
        steps = config.data.test_transforms
        self.channels = config.data.channels or 3
        self.transform = build_transform(steps, channels=self.channels)
        self._normalisations = [step for step in steps if isinstance(step, Normalize)]
        self.layer = find_layer(network, config.size)

    def prepare(self, image: Image.Image) -> Tensor:
        """Return an image as the network is shown it: (1, C, H, W)."""
        return self.transform(image)[None]

    def activation(self, images: Tensor, index: int) -> np.ndarray:
        """Return where one class is seen: (H, W), float32 from 0 to 1.

        Args:
            images: From `prepare`, on the network's device.
            index: The class.

        Raises:
            ValueError: If the stage's output is no map.
        """
        from pytorch_grad_cam import GradCAM  # slow to import, and an option
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        with torch.enable_grad(), GradCAM(model=self.network, target_layers=[self.layer]) as cam:
            (activation,) = cam(input_tensor=images.detach().requires_grad_(), targets=[ClassifierOutputTarget(index)])
        if activation.shape != images.shape[2:]:
            raise ValueError(f"{type(self.layer).__name__} returns no map of places: predict.explain=true needs one")
        return activation

    def overlay(self, image: Image.Image, index: int) -> Image.Image:
        """Return what the network is shown of an image, in RGB, with where it sees a class laid over it."""
        from pytorch_grad_cam.utils.image import show_cam_on_image

        images = self.prepare(image).to(next(self.network.parameters()).device)
        activation = self.activation(images, index)
        return Image.fromarray(show_cam_on_image(self._pixels(images[0].cpu()), activation, use_rgb=True))

    def _pixels(self, image: Tensor) -> np.ndarray:
        """Return a prepared image (C, H, W) as colours (H, W, 3) from 0 to 1."""
        for step in reversed(self._normalisations):
            image = image * _per_channel(step.std) + _per_channel(step.mean)
        image = image[:3] if self.channels >= 3 else image[:1].expand(3, -1, -1)
        # The library divides by the largest value: a black image must not be all 0.
        return image.clamp(1e-3, 1).permute(1, 2, 0).numpy().astype(np.float32)


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values)[:, None, None]
