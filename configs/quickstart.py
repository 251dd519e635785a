"""MobileMamba-T2 on 1,797 handwritten digits at 64 px: trains in minutes on two CPU cores.

``make quickstart`` writes the digits of scikit-learn as class folders to ``data/digits`` and runs::

    python3 run.py -c configs/quickstart -m train
    python3 run.py -c configs/quickstart -m test model.model_kwargs.checkpoint_path=runs/quickstart/RUN/net_E.pth

Cost: 4 epochs of 1,437 images, about 28 M MACs each. Expected top-1 of the averaged weights on the 360 test images:
98 % or more.
"""

from configs.schema import CenterCrop, Config, Normalize, Resize, TimmTrainTransform, ToTensor

MEAN = [0.5, 0.5, 0.5]
STD = [0.5, 0.5, 0.5]


def get_config() -> Config:
    """Return a fresh configuration."""
    config = Config(size=64, nb_classes=10, epoch_full=4, warmup_epochs=1, test_start_epoch=0, batch_size=64)
    config.lr = 1.6e-2  # 2e-3 as applied to a batch of 64
    config.model.name = "MobileMamba_T2"

    config.data.root = "data/digits"
    # A mirrored digit is another sign: only small crops.
    config.data.train_transforms = [
        TimmTrainTransform(
            scale=[0.8, 1.0],
            ratio=[0.9, 1.1],
            hflip=0.0,
            color_jitter=None,
            auto_augment=None,
            interpolation="bilinear",
            re_prob=0.0,
            mean=MEAN,
            std=STD,
        )
    ]
    config.data.test_transforms = [
        Resize(crop_pct=1.0, interpolation="bilinear"),
        CenterCrop(),
        ToTensor(),
        Normalize(mean=MEAN, std=STD),
    ]

    config.trainer.checkpoint = "runs/quickstart"
    config.trainer.data.num_workers_per_gpu = 2
    config.trainer.mixup_kwargs.prob = 0.0
    config.trainer.scaler = "none"
    config.trainer.ema = 0.9  # averages over some 10 of the run's 88 steps
    config.logging.train_log_per = 5
    config.logging.train_reset_log_per = 5
    return config
