"""Image pipelines from their configuration."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_modes_mapping

from configs.schema import CenterCrop, Normalize, Resize, TimmTrainTransform, ToTensor, Transform

from .images import MODES
from .warp import warp_by_opencv

__all__ = ["build_transform", "takes_arrays"]

ImageTransform = Callable[[Image.Image | np.ndarray], Tensor]


def build_transform(steps: Sequence[Transform], *, channels: int = 3) -> ImageTransform:
    """Build a pipeline from image to float tensor (C, H, W).

    timm's augmentations need RGB: a gray image passes as three equal channels, of which one is left at the end. The
    randomness comes only from the global generators of Python, NumPy and PyTorch.

    Args:
        steps: In the order in which they are applied.
        channels: Of the images.

    Raises:
        ValueError: If a step is unknown, or an entry of it has no meaning to timm or torchvision.
    """
    if channels != 1:
        return transforms.Compose([_build_step(step) for step in steps])
    return transforms.Compose([_as_rgb, *(_build_step(_for_rgb(step)) for step in steps), _first_channel])


def _as_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _for_rgb(step: Transform) -> Transform:
    """Return a step for gray images, with its normalisation for three equal channels."""
    if not isinstance(step, Normalize | TimmTrainTransform):
        return step
    return replace(step, mean=3 * list(step.mean), std=3 * list(step.std))


def _first_channel(image: Tensor) -> Tensor:
    return image[:1]


def _build_step(step: Transform) -> Callable:
    match step:
        case TimmTrainTransform():
            return _build_timm(step)
        case Resize(size=int(size)):
            return transforms.Resize(size, interpolation=InterpolationMode(step.interpolation))
        case CenterCrop(size=int(size)):
            return transforms.CenterCrop(size)
        case ToTensor():
            return transforms.ToTensor()
        case Normalize():
            return transforms.Normalize(step.mean, step.std, inplace=step.inplace)
    raise ValueError(f"data transforms: {step!r} is unknown, or its size is not set")


def _build_timm(step: TimmTrainTransform) -> Callable:
    """Build timm's transform; it does the normalisation itself."""
    if step.input_size is None:
        raise ValueError("data.train_transforms: input_size of timm_create_transform is not set")
    try:
        transform = create_transform(
            input_size=step.input_size,
            is_training=step.is_training,
            color_jitter=step.color_jitter,
            auto_augment=step.auto_augment,
            interpolation=step.interpolation,
            scale=step.scale,
            ratio=step.ratio,
            hflip=step.hflip,
            vflip=step.vflip,
            mean=step.mean,
            std=step.std,
            re_prob=step.re_prob,
            re_mode=step.re_mode,
            re_count=step.re_count,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"data.train_transforms: timm cannot build auto_augment={step.auto_augment!r}, "
            f"interpolation={step.interpolation!r}, re_mode={step.re_mode!r}: {error!r}"
        ) from error
    for operation in _augment_operations(transform):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
        if step.warp == "opencv":
            warp_by_opencv(operation)
    crop = transform.transforms[0]
    if isinstance(crop, RandomResizedCropAndInterpolation):
        transform.transforms[0] = _Crop(crop) if step.resize == "pil" else _CropByTorch(crop)
    transform.transforms = list(_in_place(transform.transforms))
    return transform


def takes_arrays(steps: Sequence[Transform]) -> bool:
    """Return whether a pipeline takes arrays (H, W, C), uint8, as well as images, and is faster with them."""
    return isinstance(steps[0], TimmTrainTransform) and steps[0].is_training


class _Crop:
    """timm's random crop, of an image or of an array, of which only the crop becomes an image."""

    def __init__(self, step: RandomResizedCropAndInterpolation) -> None:
        self.step = step
        given = step.interpolation
        self.interpolations = tuple(given) if isinstance(given, (tuple, list)) else (given,)

    def __call__(self, image: Image.Image | np.ndarray) -> Image.Image:
        sized = image if isinstance(image, Image.Image) else torch.from_numpy(image).permute(2, 0, 1)
        top, left, height, width = self.step.get_params(sized, self.step.scale, self.step.ratio)
        interpolation = self.interpolations[0]
        if len(self.interpolations) > 1:
            interpolation = random.choice(self.interpolations)
        if isinstance(image, Image.Image):
            crop = image.crop((left, top, left + width, top + height))
        else:
            crop = image[top : top + height, left : left + width]
        return self.resized(crop, interpolation)

    def resized(self, crop: Image.Image | np.ndarray, interpolation: InterpolationMode) -> Image.Image:
        image = crop if isinstance(crop, Image.Image) else Image.fromarray(np.ascontiguousarray(crop))
        return image.resize(self.step.size[::-1], pil_modes_mapping[interpolation])


class _CropByTorch(_Crop):
    """The same crop, resized by PyTorch's kernels for 8 bits in place of Pillow's."""

    def __init__(self, step: RandomResizedCropAndInterpolation) -> None:
        super().__init__(step)
        if not {interpolation.value for interpolation in self.interpolations} <= {"bilinear", "bicubic"}:
            raise ValueError("data.train_transforms: resize=torch knows the interpolations bilinear, bicubic, random")

    def resized(self, crop: Image.Image | np.ndarray, interpolation: InterpolationMode) -> Image.Image:
        pixels = np.array(crop) if isinstance(crop, Image.Image) else np.ascontiguousarray(crop)
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        resized = F.interpolate(planes, self.step.size, mode=interpolation.value, antialias=True)[0]
        return Image.merge(MODES[len(resized)], [Image.fromarray(plane) for plane in resized.numpy()])


def _in_place(steps: Sequence[Callable]) -> Iterator[Callable]:
    """Yield the steps, with conversion and normalisation as one that gives the same values without copies."""
    rest = iter(steps)
    for step in rest:
        following = next(rest, None) if isinstance(step, MaybeToTensor) else None
        if isinstance(following, transforms.Normalize):
            yield _ToNormalized(following)
        else:
            yield from (each for each in (step, following) if each is not None)


class _ToNormalized:
    """An image of 8 bits as a normalised tensor (C, H, W)."""

    def __init__(self, step: transforms.Normalize) -> None:
        self.mean = torch.as_tensor(step.mean, dtype=torch.float32)[:, None, None]
        self.std = torch.as_tensor(step.std, dtype=torch.float32)[:, None, None]

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image))
        values = torch.empty(pixels.shape[2], *pixels.shape[:2])
        values.copy_(pixels.permute(2, 0, 1))
        return values.div_(255).sub_(self.mean).div_(self.std)


def _augment_operations(transform: transforms.Compose) -> Iterator[AugmentOp]:
    """Yield the operations among which RandAugment, AugMix or AutoAugment choose."""
    for step in transform.transforms:
        yield from getattr(step, "ops", ())
        for sub_policy in getattr(step, "policy", ()):
            yield from sub_policy


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Posterize as timm does; at full magnitude it keeps no bit, which is black, but an error since Pillow 13."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep, **options)
