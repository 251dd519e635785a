"""What follows from other entries, what is tied, and what contradicts."""

from __future__ import annotations

import pytest

from configs import load_config, save_config, with_classes

T2 = "configs/mobilemamba/mobilemamba_t2"
T2S = "configs/mobilemamba/mobilemamba_t2s"
NO_MIXUP = "trainer.mixup_kwargs.prob=0"


def read(config, path):
    for key in path.split("."):
        config = getattr(config, key)
    return config


TIES = [
    ["epoch_full", "trainer.epoch_full"],
    ["warmup_epochs", "trainer.scheduler_kwargs.warmup_epochs"],
    ["test_start_epoch", "trainer.test_start_epoch"],
    ["batch_size", "trainer.data.batch_size"],
    ["weight_decay", "optim.optim_kwargs.weight_decay"],
    ["nb_classes", "data.nb_classes", "model.model_kwargs.num_classes", "trainer.mixup_kwargs.num_classes"],
]


@pytest.mark.parametrize(("group", "path"), [(group, path) for group in TIES for path in group])
def test_an_override_reaches_every_entry_tied_to_it(group, path):
    config = load_config(T2, [f"{path}=8"])
    assert [read(config, name) for name in group] == [8] * len(group)


@pytest.mark.parametrize("group", TIES, ids=lambda group: group[0])
def test_two_values_for_one_quantity_are_refused(group):
    with pytest.raises(ValueError, match=f"{group[0]}=8.* and {group[-1]}=4"):
        load_config(T2, [f"{group[0]}=8", f"{group[-1]}=4"])
    load_config(T2, [f"{path}=8" for path in group])


def test_an_override_to_none_follows():
    assert load_config(T2, ["trainer.epoch_full=None"]).trainer.epoch_full == 300


@pytest.mark.parametrize("given", [[], ["trainer.data.num_workers_per_gpu=8"]], ids=["recipe", "given"])
def test_workers_that_are_given_are_told_from_the_recipes(given, tmp_path):
    """Also after a run's configuration was saved and read again."""
    config = load_config(T2, given)
    save_config(config, tmp_path / "config.yaml")
    for read in (config, load_config(tmp_path / "config.yaml")):
        assert read.trainer.data.num_workers_per_gpu == 8
        assert ("trainer.data.num_workers_per_gpu" in read.derived) == (not given)


def test_file_that_contradicts_itself_is_refused(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from configs.mobilemamba.mobilemamba_t2 import get_config as base\n"
        "def get_config():\n    config = base()\n    config.trainer.epoch_full = 10\n    return config\n"
    )
    with pytest.raises(ValueError, match=r"epoch_full=300 and trainer\.epoch_full=10"):
        load_config(file)
    assert load_config(file, ["epoch_full=20"]).trainer.epoch_full == 20


def test_teacher_follows_the_class_count_unless_given():
    teacher = "loss.loss_terms.1.cfg.model_kwargs.num_classes"
    assert load_config(T2S, ["nb_classes=10"]).loss.loss_terms[1].cfg.model_kwargs.num_classes == 10
    assert (
        load_config(T2S, ["nb_classes=10", f"{teacher}=1000"]).loss.loss_terms[1].cfg.model_kwargs.num_classes == 1000
    )


def test_size_reaches_all_transforms_unless_given():
    config = load_config(T2, ["size=256", "data.test_transforms.CenterCrop.size=240"])
    assert config.data.train_transforms[0].input_size == 256
    assert [step.size for step in config.data.test_transforms[:2]] == [292, 240]
    assert load_config(T2, ["data.test_transforms.0.crop_pct=0.9"]).data.test_transforms[0].size == 213


@pytest.mark.parametrize(("batch_size", "lr"), [(1024, 3e-3), (512, 1.5e-3), (64, 1.875e-4)])
def test_learning_rates_follow_the_total_batch(batch_size, lr):
    config = load_config(T2, [f"batch_size={batch_size}"], world_size=2)
    scheduler = config.trainer.scheduler_kwargs
    assert [config.optim.lr, scheduler.lr_min, scheduler.warmup_lr] == pytest.approx([lr, lr / 100, lr / 1000])


def test_learning_rates_follow_their_base_and_give_way_to_the_user():
    assert load_config(T2, ["lr=1e-3"]).optim.lr == pytest.approx(2e-3)
    config = load_config(T2, ["optim.lr=0.1", "trainer.scheduler_kwargs.lr_min=0"])
    assert (config.optim.lr, config.trainer.scheduler_kwargs.lr_min) == (0.1, 0.0)
    assert config.trainer.scheduler_kwargs.warmup_lr == pytest.approx(1e-4)
    with pytest.raises(ValueError, match=r"lr=0\.1 changes nothing where optim\.lr=0\.2"):
        load_config(T2, ["lr=0.1", "optim.lr=0.2"])


def test_noise_seed_follows_the_seed():
    assert load_config(T2, ["seed=3"]).trainer.scheduler_kwargs.noise_seed == 3


class TestBatches:
    """Total = per process * processes * accumulation steps."""

    def test_total_is_shared(self):
        config = load_config(T2, ["trainer.accumulation_steps=4"], world_size=8)
        assert config.trainer.data.batch_size_per_gpu == 32

    def test_share_determines_the_total_and_the_learning_rate(self):
        overrides = ["trainer.data.batch_size_per_gpu=16", "trainer.accumulation_steps=2"]
        config = load_config(T2, overrides, world_size=4)
        assert config.batch_size == config.trainer.data.batch_size == 128
        assert config.optim.lr == pytest.approx(1.5e-3 / 4)

    def test_both_may_be_given_where_they_agree(self):
        overrides = ["trainer.data.batch_size_per_gpu=16", "batch_size=64"]
        assert load_config(T2, overrides, world_size=4).batch_size == 64
        with pytest.raises(ValueError, match=r"batch_size=64 and trainer.data.batch_size_per_gpu=16 disagree.* 32"):
            load_config(T2, overrides, world_size=2)

    def test_nearest_totals_that_work_are_named(self):
        with pytest.raises(ValueError, match=r"batch_size=1024 must be a multiple of 6.* 1020 or 1026"):
            load_config(T2, world_size=3)
        with pytest.raises(ValueError, match=r"batch_size=1024 must be a multiple of 3.* 1023 or 1026"):
            load_config(T2, [NO_MIXUP], world_size=3)

    def test_mixup_needs_pairs(self):
        with pytest.raises(ValueError, match=r"batch_size_per_gpu=5 must be a multiple of 2 \(mixup pairs.* 4 or 6"):
            load_config(T2, ["trainer.data.batch_size_per_gpu=5"])

    def test_with_mixup_the_last_batch_is_dropped(self):
        last = "trainer.data.drop_last=False"
        with pytest.raises(ValueError, match=r"trainer\.data\.drop_last=False .*in pairs: .*mixup_kwargs\.prob=0"):
            load_config(T2, [last])
        assert not load_config(T2, [last, NO_MIXUP]).trainer.data.drop_last
        assert not load_config(T2, [last], mode="test").trainer.data.drop_last
        assert load_config(T2, ["trainer.data.batch_size_per_gpu=5", NO_MIXUP]).batch_size == 5

    def test_override_of_the_total_wins_over_the_share_in_a_file(self, tmp_path):
        file = tmp_path / "own.py"
        file.write_text(
            "from configs.mobilemamba._recipe import imagenet\n"
            "def get_config():\n    config = imagenet('MobileMamba_T2', 192)\n"
            "    config.trainer.data.batch_size_per_gpu = 32\n    return config\n"
        )
        assert load_config(file, world_size=2).batch_size == 64
        assert load_config(file, ["batch_size=128"], world_size=2).trainer.data.batch_size_per_gpu == 64

    @pytest.mark.parametrize("mode", ["test", "test_net"])
    def test_testing_needs_no_divisible_training_batch(self, mode):
        assert load_config(T2, mode=mode, world_size=3).trainer.data.batch_size_per_gpu_test == 125

    def test_test_batch_is_shared_without_accumulation(self):
        total, share = "trainer.data.batch_size_test", "trainer.data.batch_size_per_gpu_test"
        config = load_config(T2, [f"{total}=64", "trainer.accumulation_steps=2"], world_size=4)
        assert config.trainer.data.batch_size_per_gpu_test == 16
        assert load_config(T2, [f"{total}=64", f"{share}=32"], world_size=2).trainer.data.batch_size_test == 64
        with pytest.raises(ValueError, match=r"batch_size_test=64 and .*=32 disagree"):
            load_config(T2, [f"{total}=64", f"{share}=32"], world_size=4)
        with pytest.raises(ValueError, match=r"batch_size_test=64 must be a multiple of 3.* 63 or 66"):
            load_config(T2, [f"{total}=64"], mode="test", world_size=3)


class TestFinetuning:
    def test_mode_ft_shortens_the_run(self):
        config = load_config(T2, mode="ft")
        assert (config.epoch_full, config.trainer.epoch_full) == (30, 30)
        assert (config.warmup_epochs, config.trainer.scheduler_kwargs.warmup_epochs) == (5, 5)
        assert (config.test_start_epoch, config.trainer.test_start_epoch) == (20, 20)
        assert (config.weight_decay, config.optim.optim_kwargs.weight_decay) == (1e-8, 1e-8)
        assert config.optim.lr == pytest.approx(5e-4)
        assert config.trainer.scheduler_kwargs.lr_min == pytest.approx(5e-6)

    @pytest.mark.parametrize("path", ["epoch_full", "trainer.epoch_full", "finetune.epoch_full"])
    def test_overrides_win(self, path):
        config = load_config(T2, [f"{path}=3", "optim.lr=1e-4"], mode="ft")
        assert (config.epoch_full, config.trainer.epoch_full, config.warmup_epochs) == (3, 3, 5)
        assert config.optim.lr == 1e-4

    def test_its_entries_are_refused_where_they_change_nothing(self):
        with pytest.raises(ValueError, match=r"finetune\.epoch_full holds only with -m ft; override epoch_full"):
            load_config(T2, ["finetune.epoch_full=3"])


class TestLoss:
    OFF = (
        ["trainer.mixup_kwargs.prob=0"],
        ["trainer.mixup_kwargs.mixup_alpha=0", "trainer.mixup_kwargs.cutmix_alpha=0"],
    )

    @pytest.mark.parametrize("off", OFF)
    def test_without_mixup_the_loss_takes_class_indices(self, off):
        (term,) = load_config(T2, [*off, "loss.loss_terms.0.lam=2"]).loss.loss_terms
        assert (term.type, term.name, term.lam, term.smoothing) == ("LabelSmoothingCE", "CE", 2.0, 0.1)
        (term,) = load_config(T2, [*off, "trainer.mixup_kwargs.label_smoothing=0"]).loss.loss_terms
        assert term.type == "CE"

    def test_distillation_stays(self):
        terms = load_config(T2S, [NO_MIXUP]).loss.loss_terms
        assert [term.type for term in terms] == ["LabelSmoothingCE", "CLSKDLoss"]
        assert terms[1].cfg.name == "tresnet_l_v2"

    def test_given_smoothing_stays(self):
        terms = "loss.loss_terms=[{'type': 'LabelSmoothingCE', 'smoothing': 0.3}]"
        assert load_config(T2, [NO_MIXUP, terms]).loss.loss_terms[0].smoothing == 0.3

    @pytest.mark.parametrize("kind", ["CE", "LabelSmoothingCE"])
    def test_class_indices_with_mixup_are_refused(self, kind):
        with pytest.raises(ValueError, match=f"type={kind} takes class indices, but mixup gives probabilities"):
            load_config(T2, [f"loss.loss_terms=[{{'type': '{kind}'}}]"])

    def test_probabilities_without_mixup_are_refused_where_asked_for(self):
        with pytest.raises(ValueError, match="SoftTargetCE takes probabilities, but mixup is off"):
            load_config(T2, ["loss.loss_terms=[{'type': 'SoftTargetCE'}]", NO_MIXUP])


def test_fusing_is_for_testing():
    fuse = "model.model_kwargs.fuse=True"
    assert load_config(T2, [fuse], mode="test").model.model_kwargs.fuse
    with pytest.raises(ValueError, match=r"model\.model_kwargs\.fuse.*-m train"):
        load_config(T2, [fuse])


class TestOpenClasses:
    GROUP = TIES[-1]

    def test_the_number_reaches_every_entry_and_the_tree_stays_read_only(self):
        left_open = load_config(T2S, ["nb_classes=None"])
        assert {read(left_open, path) for path in self.GROUP} == {None}
        filled = with_classes(left_open, 7)
        assert {read(filled, path) for path in self.GROUP} == {7}
        assert filled.loss.loss_terms[1].cfg.model_kwargs.num_classes == 7
        assert left_open.nb_classes is None
        with pytest.raises(AttributeError, match="read-only"):
            filled.nb_classes = 8

    def test_it_is_as_if_the_number_had_been_given(self):
        filled, given = with_classes(load_config(T2S, ["nb_classes=None"]), 7), load_config(T2S, ["nb_classes=7"])
        assert {name: getattr(filled, name) for name in ("data", "model", "trainer", "loss", "optim")} == {
            name: getattr(given, name) for name in ("data", "model", "trainer", "loss", "optim")
        }

    def test_a_saved_run_counts_anew_unless_the_number_was_given(self, tmp_path):
        path = tmp_path / "config.yaml"
        save_config(with_classes(load_config(T2, ["nb_classes=None"]), 7), path)
        assert load_config(path).nb_classes is None
        assert load_config(path, ["nb_classes=5"]).data.nb_classes == 5
        save_config(load_config(T2, ["nb_classes=7"]), path)
        assert load_config(path).nb_classes == 7

    @pytest.mark.parametrize("path", GROUP)
    def test_predicting_leaves_the_number_to_the_checkpoint_unless_given(self, path):
        assert load_config(T2, mode="predict").data.nb_classes is None
        assert load_config(T2, [f"{path}=9"], mode="predict").nb_classes == 9


GRAY = ["data.train_transforms.0.mean=[0.5]", "data.train_transforms.0.std=[0.5]"]
GRAY += ["data.test_transforms.3.mean=[0.5]", "data.test_transforms.3.std=[0.5]"]


@pytest.mark.parametrize("path", ["model.model_kwargs.in_chans", "data.channels"])
def test_the_network_takes_the_channels_of_the_images(path):
    config = load_config(T2, [f"{path}=1", *GRAY])
    assert (config.model.model_kwargs.in_chans, config.data.channels) == (1, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.model_kwargs.in_chans=5"], r"data\.channels=5: an image has 1 \(gray\), 3 \(RGB\) or 4 \(RGBA\)"),
        (["data.channels=1"], r"data\.train_transforms\.0\.mean has 3 values, but data\.channels=1"),
        (["data.channels=1", *GRAY[:3]], r"data\.test_transforms\.3\.std has 3 values, but data\.channels=1"),
        (GRAY[:1], r"data\.train_transforms\.0\.mean has 1 values, but data\.channels=3"),
        (["data.channels=4"], r"train_transforms\.0\.auto_augment works on RGB images; set it to None"),
        (["data.channels=1", "model.model_kwargs.in_chans=3"], "name one quantity"),
    ],
)
def test_channels_that_contradict_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(T2, overrides)


def test_a_teacher_takes_the_channels_of_the_images():
    with pytest.raises(ValueError, match=r"loss_terms\.1\.cfg\.model_kwargs\.in_chans=3, but data\.channels=1"):
        load_config(T2S, ["data.channels=1", *GRAY])
    teacher = "loss.loss_terms.1.cfg.model_kwargs.in_chans=1"
    with pytest.raises(ValueError, match=r"loss_terms\.1\.mean_t has 3 values"):
        load_config(T2S, ["data.channels=1", *GRAY, teacher])
    means = [f"loss.loss_terms.1.{name}=[0.5]" for name in ("mean_t", "std_t", "mean_s", "std_s")]
    assert load_config(T2S, ["data.channels=1", *GRAY, teacher, *means]).data.channels == 1
