"""The typed tree that describes one run.

Every entry a user can override is defined here once, with its unit, its meaning and the values it accepts. An entry
whose value follows from others is ``None`` until ``configs.resolve`` fills it in after the overrides: the crop size
into both transforms, the batch size into the learning rate, the learning rate into its minimum. A value given by the
user is never replaced.

Lists of transforms and loss terms hold one dataclass per kind; its ``type`` names the kind, as in the published
recipes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from .tree import Node
from .values import (
    Count,
    Decay,
    NonNegative,
    Pair,
    PartialShare,
    Positive,
    PositiveCount,
    PositiveShare,
    Range,
    Seed,
    Share,
    Side,
)

__all__ = [
    "AnyLossTerm",
    "AnyTransform",
    "CenterCrop",
    "Config",
    "CrossEntropyTerm",
    "Data",
    "DistillationTerm",
    "Finetune",
    "LabelSmoothingTerm",
    "LogTerm",
    "Logging",
    "Loss",
    "LossTerm",
    "Mixup",
    "Model",
    "ModelKwargs",
    "Normalize",
    "Optim",
    "OptimKwargs",
    "Predict",
    "Resize",
    "Scheduler",
    "SoftTargetTerm",
    "Teacher",
    "TimmTrainTransform",
    "ToTensor",
    "Trainer",
    "TrainerData",
    "Transform",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


@dataclass(kw_only=True, slots=True)
class Transform(Node):
    """One step of an image pipeline; ``type`` names the step."""

    type: str


@dataclass(kw_only=True, slots=True)
class TimmTrainTransform(Transform):
    """timm's training transform: random crop, flip, augmentation, normalisation, erasing (paper, section 4.1)."""

    type: Literal["timm_create_transform"] = "timm_create_transform"
    input_size: Side | None = None  # pixels; follows `size`
    is_training: bool = True
    color_jitter: NonNegative | None = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    interpolation: Literal["random", Interpolation] = "random"
    resize: Literal["pil", "torch"] = "pil"  # who resizes the crop; torch: faster, other pixels, see data/README.md
    warp: Literal["pil", "opencv"] = "pil"  # who shears, shifts and rotates in auto_augment; the same holds for opencv
    scale: Pair[PositiveShare] | None = None  # range of the crop's area; timm's (0.08, 1) when None
    ratio: Pair[Positive] | None = None  # range of the crop's aspect; timm's (3/4, 4/3) when None
    hflip: Share = 0.5
    vflip: Share = 0.0
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    std: list[Positive] = field(default_factory=lambda: list(IMAGENET_STD))
    re_prob: Share = 0.25
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    re_count: PositiveCount = 1


@dataclass(kw_only=True, slots=True)
class Resize(Transform):
    """Resize the shorter side."""

    type: Literal["Resize"] = "Resize"
    size: PositiveCount | None = None  # pixels; follows `size`: int(size / crop_pct)
    crop_pct: PositiveShare = 0.875  # share of the resized side that is kept
    interpolation: Interpolation = "bicubic"


@dataclass(kw_only=True, slots=True)
class CenterCrop(Transform):
    """Crop the centre square; smaller images are padded."""

    type: Literal["CenterCrop"] = "CenterCrop"
    size: PositiveCount | None = None  # pixels; follows `size`


@dataclass(kw_only=True, slots=True)
class ToTensor(Transform):
    """PIL image to a float tensor (C, H, W) in [0, 1]."""

    type: Literal["ToTensor"] = "ToTensor"


@dataclass(kw_only=True, slots=True)
class Normalize(Transform):
    """Subtract the mean and divide by the standard deviation, per channel."""

    type: Literal["Normalize"] = "Normalize"
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    std: list[Positive] = field(default_factory=lambda: list(IMAGENET_STD))
    inplace: bool = True


AnyTransform = TimmTrainTransform | Resize | CenterCrop | ToTensor | Normalize


def evaluation_pipeline() -> list[AnyTransform]:
    """Return the published test transform: resize, centre crop, tensor, normalise."""
    return [Resize(), CenterCrop(), ToTensor(), Normalize()]


@dataclass(kw_only=True, slots=True)
class Data(Node):
    """The data set, and how an image becomes a tensor."""

    type: Literal[
        "DefaultCLS",
        "ImageFolderLMDB",
        "IN22KDataset",
        "CustomImageDataset",
        "Cifar10CLS",
        "Cifar100CLS",
        "INAT18CLS",
        "INAT19CLS",
        "Shards",
        "WebDataset",  # the same as Shards
    ] = "DefaultCLS"
    root: str = "data/imagenet"  # a folder; for shards, an http(s) address too
    cache: str = (
        ""  # folder for lists of files, indices and downloaded shards; mobilemamba below torch.hub's when empty
    )
    cache_gb: Positive = 200.0  # 10^9 bytes of downloaded shards that are kept
    # Who decodes; upright: turned as EXIF says, fast: other pixels than Pillow's, see data/README.md.
    loader_type: Literal["pil", "pil_upright", "torchvision", "simplejpeg", "simplejpeg_fast"] = "pil"
    sampler: Literal["naive", "ra"] = "naive"  # ra: repeated augmentation
    num_repeats: PositiveCount = 3  # augmented views of each image, for `ra`
    nb_classes: PositiveCount | None = None  # tied to `nb_classes`
    channels: PositiveCount | None = None  # 1: gray, 3: RGB, 4: RGBA; tied to `model.model_kwargs.in_chans`
    max_pixels: PositiveCount = 178_956_970  # larger images are unreadable; the default is Pillow's own limit
    max_unreadable: Count = 100  # unreadable training images that are skipped before the run is stopped
    train_transforms: list[AnyTransform] = field(default_factory=lambda: [TimmTrainTransform()])
    test_transforms: list[AnyTransform] = field(default_factory=evaluation_pipeline)


@dataclass(kw_only=True, slots=True)
class ModelKwargs(Node):
    """Arguments of ``model.create_model`` and of the checkpoint that it starts from."""

    pretrained: bool | str = False  # the released checkpoint, or another by its name; timm's own for `timm_<name>`
    checkpoint_path: str = ""
    ema: bool = False  # take `net_E` rather than `net` from the checkpoint
    strict: bool = True
    num_classes: PositiveCount | None = None  # tied to `nb_classes`
    in_chans: PositiveCount = 3  # tied to `data.channels`
    distillation: bool = False  # a second head, `head_dist`
    drop_path: Share | None = None  # the variant's own when None
    scan_backend: Literal["", "reference", "cpu", "cuda", "triton"] = ""  # forced for the scans; the fastest when empty
    fuse: bool = False  # fold for inference after loading; test and predict only
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments, for `timm_<name>`


@dataclass(kw_only=True, slots=True)
class Model(Node):
    """The network by name."""

    name: str = "MobileMamba_T2"
    freeze: str = ""  # what is not trained, by commas: backbone (all but the head), stem, modules such as blocks1
    released: str = ""  # the checkpoint that `pretrained=True` loads; that of the network's own name when empty
    model_kwargs: ModelKwargs = field(default_factory=ModelKwargs)


@dataclass(kw_only=True, slots=True)
class OptimKwargs(Node):
    """The optimiser by its timm name, with its own arguments."""

    name: str = "adamw"
    betas: list[PartialShare] | None = field(default_factory=lambda: [0.9, 0.999])
    eps: NonNegative | None = 1e-8
    weight_decay: NonNegative | None = None  # follows `weight_decay`; not applied to 1-D parameters and biases
    amsgrad: bool = False
    momentum: Share | None = None  # for optimisers that have one (sgd: 0.9 when None)
    nesterov: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments of the optimiser


@dataclass(kw_only=True, slots=True)
class Optim(Node):
    """The learning rate as applied, and the optimiser."""

    lr: NonNegative | None = None  # follows: `lr` * total batch / 512, in mode ft divided by finetune.lr_divisor
    layer_decay: Positive | None = None  # factor of the learning rate per layer, from the head down
    optim_kwargs: OptimKwargs = field(default_factory=OptimKwargs)


@dataclass(kw_only=True, slots=True)
class Scheduler(Node):
    """The learning rate over time; iterations are optimiser steps."""

    name: Literal["cosine", "tanh", "step", "multistep", "plateau", "poly", "none"] = "cosine"
    lr_noise: Pair[Share] | None = None  # fractions of the run between which noise is added
    noise_pct: NonNegative = 0.67
    noise_std: NonNegative = 1.0
    noise_seed: Count | None = None  # follows `seed`
    lr_min: NonNegative | None = None  # follows: optim.lr / 100
    warmup_lr: NonNegative | None = None  # follows: optim.lr / 1000
    warmup_iters: Annotated[int, Range(at_least=-1)] = -1  # -1: from warmup_epochs
    cooldown_iters: Count = 0
    warmup_epochs: Count | None = None  # follows `warmup_epochs`
    cooldown_epochs: Count = 0
    use_iters: bool = True  # step every iteration rather than every epoch
    patience_iters: Count = 0
    patience_epochs: Count = 0
    decay_iters: Count = 0
    decay_epochs: Count = 0
    decay_milestones: list[Count] = field(default_factory=list)  # epochs, for multistep
    decay_rate: NonNegative = 0.1  # factor at each decay, for step, multistep, plateau, poly's power
    cycle_decay: NonNegative = 0.1


@dataclass(kw_only=True, slots=True)
class TrainerData(Node):
    """Batches and loader workers. Total batch = per-device batch * processes * accumulation steps."""

    batch_size: PositiveCount | None = None  # images per optimiser step over all processes; tied to `batch_size`
    batch_size_per_gpu: PositiveCount | None = None  # follows the total, or determines it where given
    batch_size_test: PositiveCount | None = None  # images per test step over all processes, where given
    batch_size_per_gpu_test: PositiveCount = 125  # follows the total where that is given
    num_workers_per_gpu: Count | None = None  # follows: the recipe's 8, or fewer where cores are few
    drop_last: bool = True
    pin_memory: bool = True
    persistent_workers: bool = False


@dataclass(kw_only=True, slots=True)
class Mixup(Node):
    """timm's Mixup; both alphas 0 turn it off, and the loss follows."""

    mixup_alpha: NonNegative = 0.8
    cutmix_alpha: NonNegative = 1.0
    cutmix_minmax: Pair[Share] | None = None
    prob: Share = 1.0
    switch_prob: Share = 0.5
    mode: Literal["batch", "pair", "elem"] = "batch"
    correct_lam: bool = True
    label_smoothing: PartialShare = 0.1
    num_classes: PositiveCount | None = None  # tied to `nb_classes`

    @property
    def is_active(self) -> bool:
        """Whether any image is mixed."""
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0 or self.cutmix_minmax is not None)


@dataclass(kw_only=True, slots=True)
class Trainer(Node):
    """The training loop: its length, precision, tests and checkpoints."""

    name: str = "CLSTrainer"
    checkpoint: str = "runs/mobilemamba"  # folder in which each run makes its own
    resume_dir: str = ""  # a run's folder, to resume from its latest checkpoint; auto: the newest of this configuration
    resume_rescale: bool = False  # accept another total batch size at a resume
    resume_optimizer: bool = True  # False: a resumed run starts its optimiser afresh
    resume_data: bool = False  # accept another validation set, or images of other contents, at a resume
    cuda_deterministic: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    epoch_full: PositiveCount | None = None  # tied to `epoch_full`
    scheduler_kwargs: Scheduler = field(default_factory=Scheduler)
    data: TrainerData = field(default_factory=TrainerData)
    mixup_kwargs: Mixup = field(default_factory=Mixup)
    test_start_epoch: Count | None = None  # from here on every epoch is tested; tied to `test_start_epoch`
    test_per_epoch: PositiveCount = 5  # before that, every so many
    save_per_epoch: PositiveCount = 15
    save_per_iter: Count = 0  # also save the latest checkpoint every so many iterations; 0: at epoch ends
    async_save: bool = False  # a thread writes the checkpoints, from a copy in memory, while training continues
    keep_checkpoints: PositiveCount | None = None  # periodic checkpoints that are kept, the newest; None: all
    find_unused_parameters: bool = False
    sync_BN: Literal["none", "native", "apex"] = "none"
    dist_BN: Literal["", "reduce", "broadcast"] = ""  # BN statistics over processes before each test
    scaler: Literal["none", "native", "apex"] = "native"  # none: fp32; native: AMP
    amp_dtype: Literal["float16", "bfloat16"] = "float16"  # float16: scaled, GPU only
    ema: Decay | None = 0.9998  # decay of the weight average; None: no average
    accumulation_steps: PositiveCount = 1
    channels_last: bool | None = None  # how weights and images lie in memory; None: so on a GPU
    compile: bool = False  # torch.compile the training network
    max_bad_steps: PositiveCount = 50  # consecutive steps with a NaN or Inf before the run is stopped
    timeout_seconds: PositiveCount = 1800  # a process that waits longer for the others gives up
    profile: str = ""  # steps FIRST:LAST since the start, such as 10:15, of which the run's folder gets a profile

    @property
    def profiled_steps(self) -> range:
        """Steps of `profile`, counted from 1; none where it is empty."""
        first, _, last = self.profile.partition(":")
        return range(int(first), int(last) + 1) if self.profile else range(0)


@dataclass(kw_only=True, slots=True)
class LossTerm(Node):
    """One summand of the loss: ``lam`` times the loss of its ``type``, logged as ``name``."""

    type: str
    name: str = "CE"
    lam: float = 1.0
    fp32: bool = True


@dataclass(kw_only=True, slots=True)
class CrossEntropyTerm(LossTerm):
    """Cross-entropy with class indices."""

    type: Literal["CE"] = "CE"


@dataclass(kw_only=True, slots=True)
class LabelSmoothingTerm(LossTerm):
    """Cross-entropy with class indices, a share of the target spread over all classes."""

    type: Literal["LabelSmoothingCE"] = "LabelSmoothingCE"
    smoothing: PartialShare | None = None  # follows trainer.mixup_kwargs.label_smoothing


@dataclass(kw_only=True, slots=True)
class SoftTargetTerm(LossTerm):
    """Cross-entropy with target probabilities, as mixup gives them."""

    type: Literal["SoftTargetCE"] = "SoftTargetCE"


@dataclass(kw_only=True, slots=True)
class Teacher(Node):
    """The network distilled from."""

    name: str = "tresnet_l_v2"
    model_kwargs: ModelKwargs = field(
        default_factory=lambda: ModelKwargs(checkpoint_path="pretrained/tresnet_l_v2_83_9.pth")
    )


@dataclass(kw_only=True, slots=True)
class DistillationTerm(LossTerm):
    """Distillation from a teacher with its own input size and normalisation (the published † recipes)."""

    type: Literal["CLSKDLoss"] = "CLSKDLoss"
    name: str = "KD"
    lam: float = 5.0
    cfg: Teacher = field(default_factory=Teacher)
    kd_type: Literal["soft", "hard"] = "soft"  # soft: KL of log-softmax; hard: cross-entropy with the teacher's class
    tau: Positive = 1.0
    size: Side = 224  # pixels; the teacher's input is resized to it, bicubic
    mean_t: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    std_t: list[Positive] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    mean_s: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    std_s: list[Positive] = field(default_factory=lambda: list(IMAGENET_STD))


AnyLossTerm = CrossEntropyTerm | LabelSmoothingTerm | SoftTargetTerm | DistillationTerm


@dataclass(kw_only=True, slots=True)
class Loss(Node):
    """The summands of the loss, and what happens to the gradient."""

    # Without mixup, SoftTargetCE becomes LabelSmoothingCE, or CE where trainer.mixup_kwargs.label_smoothing is 0.
    loss_terms: list[AnyLossTerm] = field(default_factory=lambda: [SoftTargetTerm()])
    clip_grad: Annotated[float, Range(above=0, without="no clipping")] | None = 5.0
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    create_graph: bool = False
    retain_graph: bool = False


@dataclass(kw_only=True, slots=True)
class LogTerm(Node):
    """One column of a log line."""

    name: str
    fmt: str = ":>5.3f"
    show_name: Literal["val", "avg", "sum"] = "val"  # what is shown
    add_name: Literal["", "val", "avg", "sum"] = ""  # shown next to it, in brackets


def _train_terms() -> list[LogTerm]:
    return [
        LogTerm(name="batch_t", add_name="avg"),
        LogTerm(name="data_t"),
        LogTerm(name="optim_t"),
        LogTerm(name="lr", fmt=":>7.6f"),
        LogTerm(name="CE", add_name="avg"),
        LogTerm(name="KD", add_name="avg"),
    ]


def _test_terms() -> list[LogTerm]:
    counts = [LogTerm(name=name, fmt=":>6.0f", show_name="sum") for name in ("top1_cnt", "top5_cnt", "top_all")]
    return [LogTerm(name="batch_t", add_name="avg"), *counts]


@dataclass(kw_only=True, slots=True)
class Logging(Node):
    """The columns of log lines, and every how many iterations they are logged."""

    log_terms_train: list[LogTerm] = field(default_factory=_train_terms)
    log_terms_test: list[LogTerm] = field(default_factory=_test_terms)
    train_reset_log_per: PositiveCount = 50
    train_log_per: PositiveCount = 50
    test_log_per: PositiveCount = 50
    wandb: str = ""  # also log to this project of Weights & Biases; WANDB_MODE=offline: into the run's folder
    mlflow: str = ""  # also log to this experiment of MLflow; MLFLOW_TRACKING_URI says where


@dataclass(kw_only=True, slots=True)
class Finetune(Node):
    """Values that mode ft puts in place of the entries of the same name at the top."""

    epoch_full: PositiveCount = 30
    warmup_epochs: Count = 5
    test_start_epoch: Count = 20
    weight_decay: NonNegative = 1e-8
    lr_divisor: Positive = 6.0  # of optim.lr


@dataclass(kw_only=True, slots=True)
class Predict(Node):
    """Input and output of mode predict; nothing is written where no file is named."""

    input: str = ""  # an image, a folder with images at any depth, or a glob such as photos/**/*.jpg
    top_k: PositiveCount = 5  # classes that are named for each image
    output: str = ""  # file of all predictions, .json or .csv
    sheet: str = ""  # picture file that shows the images with their classes, .png, .jpg, ...
    sheet_images: PositiveCount = 100  # images on the sheet at most, the first ones
    explain: bool = False  # beside each of them, where the network sees its first class (needs grad-cam)


@dataclass(kw_only=True, slots=True)
class Config(Node):
    """One run. The entries at the top are shorthands that the entries below follow."""

    mode: Literal["train", "ft", "test", "test_net", "predict"] = "train"  # given by -m
    seed: Seed = 42
    size: Side = 224  # pixels, the side of the square input
    epoch_full: PositiveCount = 300
    warmup_epochs: Count = 20
    test_start_epoch: Count = 200
    batch_size: PositiveCount = 1024  # images per optimiser step over all processes
    lr: NonNegative = 1.5e-3  # per 512 images
    weight_decay: NonNegative = 0.05
    nb_classes: PositiveCount | None = 1000  # None: counted in the data set, in mode predict in the checkpoint
    finetune: Finetune = field(default_factory=Finetune)
    predict: Predict = field(default_factory=Predict)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    trainer: Trainer = field(default_factory=Trainer)
    loss: Loss = field(default_factory=Loss)
    logging: Logging = field(default_factory=Logging)
    derived: list[str] = field(default_factory=list)  # entries that configs.resolve filled in, and fills in again
