"""Overrides: every entry that users know, each kind of value, and what faulty ones are told."""

from __future__ import annotations

import pytest

from configs import load_config, to_dict

T2 = "configs/mobilemamba/mobilemamba_t2"
T2S = "configs/mobilemamba/mobilemamba_t2s"
NO_MIXUP = "trainer.mixup_kwargs.prob=0"

# Every override that the release documents, and what it must become.
KNOWN = {
    "model.name=timm_resnet18": "timm_resnet18",
    "model.model_kwargs.checkpoint_path=weights/a=b.pth": "weights/a=b.pth",
    "model.model_kwargs.ema=True": True,
    "model.model_kwargs.strict=false": False,
    "model.model_kwargs.num_classes=10": 10,
    "model.model_kwargs.pretrained=yes": True,
    "model.model_kwargs.pretrained=mobilemamba_t2s": "mobilemamba_t2s",
    "data.type=ImageFolderLMDB": "ImageFolderLMDB",
    "data.root=/data/my images": "/data/my images",
    "data.nb_classes=100": 100,
    "data.sampler=ra": "ra",
    "data.loader_type=torchvision": "torchvision",
    "trainer.epoch_full=7": 7,
    "trainer.resume_dir=runs/one": "runs/one",
    "trainer.checkpoint=": "",
    "trainer.ema=None": None,
    "trainer.scaler=none": "none",
    "trainer.sync_BN=native": "native",
    "trainer.dist_BN=reduce": "reduce",
    "trainer.test_start_epoch=0": 0,
    "trainer.test_per_epoch=1": 1,
    "trainer.save_per_epoch=2": 2,
    "trainer.find_unused_parameters=on": True,
    "trainer.data.batch_size=64": 64,
    "trainer.data.batch_size_per_gpu=8": 8,
    "trainer.data.batch_size_per_gpu_test=9": 9,
    "trainer.data.num_workers_per_gpu=0": 0,
    "trainer.mixup_kwargs.mixup_alpha=0.2": 0.2,
    "trainer.mixup_kwargs.cutmix_alpha=0": 0.0,
    "trainer.mixup_kwargs.cutmix_minmax=[0.2,0.8]": [0.2, 0.8],
    "trainer.mixup_kwargs.prob=.5": 0.5,
    "trainer.mixup_kwargs.switch_prob=1": 1.0,
    "trainer.mixup_kwargs.mode=elem": "elem",
    "trainer.mixup_kwargs.correct_lam=0": False,
    "trainer.mixup_kwargs.label_smoothing=0.2": 0.2,
    "trainer.mixup_kwargs.num_classes=5": 5,
    "optim.lr=1e-3": 1e-3,
    "optim.optim_kwargs.name=sgd": "sgd",
    "optim.optim_kwargs.betas=(0.8, 0.95)": [0.8, 0.95],
    "optim.optim_kwargs.eps=null": None,
    "optim.optim_kwargs.weight_decay=0.01": 0.01,
    "optim.optim_kwargs.amsgrad=1": True,
    "optim.optim_kwargs.extra.foreach=False": False,
    "optim.optim_kwargs.extra.note=as it is": "as it is",
    "optim.optim_kwargs.extra={'fused': True}": {"fused": True},
    "loss.clip_grad=null": None,
    "logging.train_log_per=1": 1,
    "logging.test_log_per=2": 2,
    "logging.train_reset_log_per=1e3": 1000,
    "logging.log_terms_train.0.fmt=:>5.1f": ":>5.1f",
    "seed=7": 7,
    "size=256": 256,
}


def read(config, path):
    value = to_dict(config)
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


@pytest.mark.parametrize(("override", "expected"), KNOWN.items(), ids=KNOWN)
def test_override_reaches_the_entry_it_names(override, expected):
    path = override.partition("=")[0]
    value = read(load_config(T2, [override]), path)
    assert value == expected
    assert type(value) is type(expected)


def test_the_last_of_equal_overrides_holds():
    assert load_config(T2, ["seed=1", "seed=2"]).seed == 2


def test_overrides_name_list_elements_by_index_type_or_name():
    overrides = [
        "data.train_transforms.0.color_jitter=0.2",
        "data.test_transforms.Resize.crop_pct=1",
        "loss.loss_terms.KD.tau=2",
        "loss.loss_terms.SoftTargetCE.lam=0.5",
        "logging.log_terms_train.lr.fmt=:>8.7f",
    ]
    config = load_config(T2S, overrides)
    assert config.data.train_transforms[0].color_jitter == 0.2
    assert config.data.test_transforms[0].size == 192
    assert config.loss.loss_terms[1].tau == 2.0
    assert config.loss.loss_terms[0].lam == 0.5
    assert config.logging.log_terms_train[3].fmt == ":>8.7f"


def test_a_list_element_is_replaced_alone():
    config = load_config(T2, ["optim.optim_kwargs.betas.1=0.99"])
    assert config.optim.optim_kwargs.betas == (0.9, 0.99)


def test_whole_lists_are_given_as_python_or_json():
    overrides = [
        "data.test_transforms=[{'type': 'Resize', 'crop_pct': 1.0}, {'type': 'ToTensor'}]",
        'logging.log_terms_test=[{"name": "batch_t", "show_name": "avg"}]',
        'loss.loss_terms=[{"type": "CE", "name": "CE", "fp32": false}]',
        NO_MIXUP,
    ]
    config = load_config(T2, overrides)
    assert [step.type for step in config.data.test_transforms] == ["Resize", "ToTensor"]
    assert config.data.test_transforms[0].size == 192
    assert config.logging.log_terms_test[0].show_name == "avg"
    assert (config.loss.loss_terms[0].type, config.loss.loss_terms[0].fp32) == ("CE", False)


FAULTS = {
    # a name that is no entry, at any level
    "trainer.epochfull=3": ["trainer.epochfull", "'trainer.epoch_full'"],
    "trianer.data.batch_size=3": ["trianer.data.batch_size", "'trainer.data.batch_size'"],
    "checkpoint_path=a.pth": ["'model.model_kwargs.checkpoint_path'"],
    "model.num_classes=10": ["'model.model_kwargs.num_classes'"],
    "size.height=64": ["size.height", "'size'"],
    "data.train_transforms.3.hflip=0": ["data.train_transforms.3.hflip", "'data.train_transforms.0.hflip'"],
    "logging.log_terms_train.loss.fmt=x": ["logging.log_terms_train.loss.fmt"],
    # a value of another type
    "size=big": ["size='big'", "an integer"],
    "epoch_full=1.5": ["epoch_full='1.5'", "an integer"],
    "optim.lr=fast": ["optim.lr='fast'", "a number"],
    "optim.lr=nan": ["optim.lr='nan'", "a number"],
    "seed=True": ["seed='True'", "an integer"],
    "seed=None": ["seed='None'", "an integer"],
    "model.model_kwargs.ema=maybe": ["model.model_kwargs.ema='maybe'", "true or false"],
    "optim.optim_kwargs.betas=0.9": ["optim.optim_kwargs.betas='0.9'", "a list"],
    "optim.optim_kwargs.betas=[0.9,'a']": ["optim.optim_kwargs.betas.1='a'", "a number"],
    "optim.optim_kwargs.extra=3": ["optim.optim_kwargs.extra", "a dictionary"],
    "optim.optim_kwargs.extra={1: 2}": ["optim.optim_kwargs.extra", "a dictionary of names and values"],
    "loss.loss_terms=[3]": ["loss.loss_terms.0=3", "SoftTargetTerm"],
    "loss.loss_terms=[{'type': 'SoftCE'}]": ["loss.loss_terms.0.type='SoftCE'", "did you mean 'SoftTargetCE'"],
    "loss.loss_terms=[{'type': 'CE', 'lamb': 1}]": ["loss.loss_terms.0.lamb", "'loss.loss_terms.0.lam'"],
    "logging.log_terms_train=[{'fmt': ':>3'}]": ["logging.log_terms_train.0.name", "needs"],
    # none of the choices
    "data.sampler=nave": ["data.sampler='nave'", "did you mean 'naive'"],
    "data.loader_type=PIL": ["did you mean 'pil'"],
    "data.type=LMDB": ["did you mean 'ImageFolderLMDB'"],
    "trainer.scaler=nativ": ["did you mean 'native'"],
    "trainer.amp_dtype=bf16": ["'float16', 'bfloat16'"],
    "trainer.sync_BN=True": ["'none', 'native', 'apex'"],
    "trainer.dist_BN=reduced": ["did you mean 'reduce'"],
    "trainer.device=gpu": ["'auto', 'cpu', 'cuda'"],
    "trainer.mixup_kwargs.mode=batches": ["did you mean 'batch'"],
    "trainer.scheduler_kwargs.name=cosin": ["did you mean 'cosine'"],
    "loss.clip_mode=norms": ["did you mean 'norm'"],
    "logging.log_terms_train.0.show_name=average": ["did you mean 'avg'"],
    # out of range
    "lr=-1": ["lr='-1'", ">= 0"],
    "size=31": ["size='31'", ">= 32"],
    "epoch_full=0": ["epoch_full='0'", ">= 1"],
    "batch_size=0": ["batch_size='0'", ">= 1"],
    "trainer.accumulation_steps=0": ["trainer.accumulation_steps='0'", ">= 1"],
    "trainer.mixup_kwargs.prob=1.5": ["trainer.mixup_kwargs.prob='1.5'", ">= 0 and <= 1"],
    "trainer.ema=1": ["trainer.ema='1'", "> 0 and < 1, or None for no average"],
    "trainer.ema=0": ["trainer.ema='0'", "> 0 and < 1, or None for no average"],
    "loss.clip_grad=0": ["loss.clip_grad='0'", "> 0, or None for no clipping"],
    "loss.clip_grad=-1": ["loss.clip_grad='-1'", "> 0, or None for no clipping"],
    "loss.loss_terms=[{'type': 'LabelSmoothingCE', 'smoothing': 1}]": ["loss.loss_terms.0.smoothing=1", ">= 0 and < 1"],
    "trainer.mixup_kwargs.label_smoothing=1": ["trainer.mixup_kwargs.label_smoothing='1'", ">= 0 and < 1"],
    "loss.loss_terms=[{'type': 'CLSKDLoss', 'tau': 0}]": ["loss.loss_terms.0.tau=0", "> 0"],
    "loss.loss_terms=[{'type': 'CLSKDLoss', 'size': 0}]": ["loss.loss_terms.0.size=0", ">= 32"],
    "loss.loss_terms=[{'type': 'CLSKDLoss', 'std_t': [1, 0, 1]}]": ["loss.loss_terms.0.std_t.1=0", "> 0"],
    "loss.loss_terms=[{'type': 'CLSKDLoss', 'kd_type': 'sort'}]": ["kd_type='sort'", "'soft', 'hard'"],
    "optim.optim_kwargs.betas=[0.9,1]": ["optim.optim_kwargs.betas.1=1", ">= 0 and < 1"],
    "optim.layer_decay=0": ["optim.layer_decay='0'", "> 0"],
    "trainer.scheduler_kwargs.lr_min=-1": ["trainer.scheduler_kwargs.lr_min='-1'", ">= 0"],
    "trainer.scheduler_kwargs.warmup_lr=-1": ["trainer.scheduler_kwargs.warmup_lr='-1'", ">= 0"],
    "trainer.scheduler_kwargs.warmup_iters=-2": ["trainer.scheduler_kwargs.warmup_iters='-2'", ">= -1"],
    "trainer.scheduler_kwargs.lr_noise=[0.5]": [
        "trainer.scheduler_kwargs.lr_noise='[0.5]'",
        "a list of 2, each a number",
    ],
    "trainer.scheduler_kwargs.lr_noise=[0.5,2]": ["trainer.scheduler_kwargs.lr_noise.1=2", "<= 1"],
    "trainer.mixup_kwargs.cutmix_minmax=[0.2,0.8,1]": ["trainer.mixup_kwargs.cutmix_minmax", "a list of 2", "or None"],
    "data.train_transforms.0.scale=[0,0.5]": ["data.train_transforms.0.scale.0=0", "> 0 and <= 1"],
    "data.train_transforms.0.ratio=[1]": [
        "data.train_transforms.0.ratio='[1]'",
        "a list of 2, each a number > 0, or None",
    ],
    "data.test_transforms.0.crop_pct=0": ["data.test_transforms.0.crop_pct='0'", "> 0 and <= 1"],
    "seed=-1": ["seed='-1'", ">= 0"],
    "seed=4294967295": ["seed='4294967295'", "<= 4e+09"],
    # no assignment to an entry
    "--resume": ["'--resume'", "path.key=value"],
    "=3": ["'=3'", "path.key=value"],
    "trainer=5": ["trainer=5", "group", "trainer."],
    "trainer.mixup_kwargs={'prob': 0}": ["trainer.mixup_kwargs", "group"],
    "loss.loss_terms.0=CE": ["loss.loss_terms.0", "group"],
    "loss.loss_terms.0.type=CE": ["loss.loss_terms.0.type='CE'", "'SoftTargetCE'"],
    "mode=ft": ["mode", "-m"],
    "derived=[]": ["derived"],
}


@pytest.mark.parametrize(("override", "parts"), FAULTS.items(), ids=FAULTS)
def test_faulty_override_is_refused_with_the_way_out(override, parts):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the parts of the message are checked below
        load_config(T2, [override])
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


AT_THE_EDGE = {
    "loss.clip_grad=1e-3": 1e-3,
    "trainer.mixup_kwargs.label_smoothing=0": 0.0,
    "trainer.mixup_kwargs.cutmix_minmax=[0,1]": [0.0, 1.0],
    "optim.optim_kwargs.betas=[0,0.99,0.999]": [0.0, 0.99, 0.999],
    "trainer.scheduler_kwargs.lr_noise=[0,1]": [0.0, 1.0],
    "trainer.scheduler_kwargs.lr_min=0": 0.0,
    "data.train_transforms.0.scale=[0.01,1]": [0.01, 1.0],
    "seed=4000000000": 4_000_000_000,
}


@pytest.mark.parametrize(("override", "expected"), AT_THE_EDGE.items(), ids=AT_THE_EDGE)
def test_value_at_the_edge_of_its_range_is_taken(override, expected):
    assert read(load_config(T2, [override]), override.partition("=")[0]) == expected


@pytest.mark.parametrize("path", ["data.train_transforms.timm.hflip", "logging.log_terms_test.top.fmt"])
def test_list_element_by_a_name_that_no_element_has(path):
    with pytest.raises(ValueError, match=path.replace(".", r"\.")):
        load_config(T2, [f"{path}=0"])


def test_lists_inside_a_dictionary_are_reached():
    extra = "optim.optim_kwargs.extra"
    config = load_config(T2, [f"{extra}={{'a': [1, 2]}}", f"{extra}.a.0=[3]"])
    assert to_dict(config)["optim"]["optim_kwargs"]["extra"] == {"a": [[3], 2]}


@pytest.mark.parametrize(
    "path", ["optim.optim_kwargs.extra.", "optim.optim_kwargs.extra.a.b", "optim.optim_kwargs..lr"]
)
def test_unnamed_and_missing_entries_of_a_dictionary_are_refused(path):
    with pytest.raises(ValueError, match="there is no such entry"):
        load_config(T2, [f"{path}=1"])


def test_saved_configuration_that_names_code_is_refused(tmp_path):
    saved = tmp_path / "config.yaml"
    saved.write_text(f"data: !!python/object/apply:os.system ['touch {tmp_path}/marker']\n")
    with pytest.raises(ValueError, match=r"config\.yaml: not YAML: .*python/object/apply"):
        load_config(saved)
    assert not (tmp_path / "marker").exists()
