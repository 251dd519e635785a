"""The ImageNet-1K recipe of the MobileMamba paper (arXiv 2411.15941), each hyper-parameter once.

A model's file names the network and its input size; what follows from these, such as the crops and the learning rate
as applied, is filled in by ``configs.resolve``.
"""

from __future__ import annotations

from configs.schema import Config, DistillationTerm, Mixup, OptimKwargs, SoftTargetTerm, TimmTrainTransform

__all__ = ["distilled", "imagenet"]


def imagenet(name: str, size: int) -> Config:
    """Return the recipe of the plain models: 300 epochs, from the labels only.

    Args:
        name: The network, as ``model.create_model`` knows it.
        size: Side of the square input in pixels.
    """
    config = Config(size=size, seed=42, nb_classes=1000)
    config.epoch_full = 300
    config.warmup_epochs = 20
    config.test_start_epoch = 200
    config.batch_size = 1024
    config.lr = 1.5e-3
    config.weight_decay = 0.05

    config.model.name = name
    config.optim.optim_kwargs = OptimKwargs(name="adamw", betas=[0.9, 0.999], eps=1e-8)
    config.trainer.scheduler_kwargs.name = "cosine"
    config.trainer.scaler = "native"
    config.trainer.ema = 0.9998
    config.trainer.mixup_kwargs = Mixup(
        mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1
    )
    config.data.train_transforms = [
        TimmTrainTransform(
            color_jitter=0.4,
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="random",
            re_prob=0.25,
            re_mode="pixel",
        )
    ]
    config.loss.loss_terms = [SoftTargetTerm(lam=1.0)]
    config.loss.clip_grad = 5.0
    return config


def distilled(name: str, size: int) -> Config:
    """Return the recipe of the † models: 1000 epochs, from the labels and a TResNet-L v2 teacher.

    Args:
        name: The network, as ``model.create_model`` knows it.
        size: Side of the square input in pixels; the teacher has its own.
    """
    config = imagenet(name, size)
    config.epoch_full = 1000
    config.model.released = f"{name.lower()}s"
    config.loss.loss_terms += [DistillationTerm(lam=5.0, kd_type="soft", tau=1.0, size=224)]
    return config
