"""Image pipelines from their configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from configs.schema import CenterCrop, Normalize, Resize, TimmTrainTransform, ToTensor, Transform

__all__ = ["build_transform"]

ImageTransform = Callable[[Image.Image], Tensor]


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
    return transform


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
