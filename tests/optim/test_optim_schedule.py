"""The learning rate of every step: schedules against closed forms and PyTorch, resuming, faulty entries."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from configs.schema import Config
from optim import build_scheduler

STEPS = 10  # optimiser steps in an epoch of the small runs


def make_optimizer(lr: float = 1.0, scales: tuple[float, ...] = (1.0,)) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr_scale": scale} for scale in scales]
    return torch.optim.SGD(groups, lr=lr)


def make_config(name: str = "cosine", epoch_full: int = 8, **entries) -> Config:
    config = Config()
    config.trainer.epoch_full = epoch_full
    settings = config.trainer.scheduler_kwargs
    settings.name = name
    settings.lr_min = 0.01
    settings.warmup_lr = 0.001
    settings.warmup_epochs = 0
    settings.noise_seed = 42
    for entry, value in entries.items():
        setattr(settings, entry, value)
    return config


def rates(config: Config, *, num_updates: int, optimizer=None, steps: int = STEPS) -> list[float]:
    """Return the learning rate that each optimiser step uses."""
    optimizer = optimizer or make_optimizer()
    schedule = build_scheduler(config, optimizer, steps_per_epoch=steps)
    values = []
    for update in range(num_updates):
        schedule.step(update)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def test_published_recipe():
    """MobileMamba_T2 on 8 devices: the learning rates that its log prints."""
    config = make_config(epoch_full=300, warmup_epochs=20, lr_min=3e-5, warmup_lr=3e-6)
    optimizer = make_optimizer(lr=3e-3)
    schedule = build_scheduler(config, optimizer, steps_per_epoch=1251)
    printed = {}
    for update in (0, 50, 25019, 25020, 280100, 375299):
        schedule.step(update)
        printed[update] = f"{optimizer.param_groups[0]['lr']:>7.6f}"
    assert printed[50] == "0.000009"
    assert printed[280100] == "0.000477"
    assert printed[0] == "0.000003"
    assert printed[25019] == "0.003000"
    assert printed[25020] == f"{3e-5 + 0.5 * 2.97e-3 * (1 + math.cos(math.pi * 20 / 300)):.6f}" == "0.002968"
    assert printed[375299] == "0.000030"
    assert schedule.num_epochs == 300


def test_before_the_first_step_the_rate_is_that_of_step_0():
    optimizer = make_optimizer()
    build_scheduler(make_config(warmup_epochs=2), optimizer, steps_per_epoch=STEPS)
    assert optimizer.param_groups[0]["lr"] == 0.001


def cosine(progress: float) -> float:
    return 0.01 + 0.5 * 0.99 * (1 + math.cos(math.pi * progress))


def test_cosine_is_not_shifted_by_the_warm_up():
    values = rates(make_config(warmup_epochs=2), num_updates=80)
    assert values[:20] == pytest.approx([0.001 + i / 20 * 0.999 for i in range(20)])
    assert values[20:] == pytest.approx([cosine(i / 80) for i in range(20, 80)])


def test_warm_up_in_iterations():
    values = rates(make_config(warmup_epochs=2, warmup_iters=7), num_updates=80)
    assert values[:7] == pytest.approx([0.001 + i / 7 * 0.999 for i in range(7)])
    assert values[7:] == pytest.approx([cosine(i / 80) for i in range(7, 80)])
    assert rates(make_config(warmup_epochs=2, warmup_iters=0), num_updates=1) == [1.0]


def test_per_epoch_the_rate_stands_still_within_an_epoch():
    values = rates(make_config(warmup_epochs=2, use_iters=False), num_updates=80)
    expected = [0.001, 0.001 + 0.5 * 0.999, *(cosine(epoch / 8) for epoch in range(2, 8))]
    assert values == pytest.approx([rate for rate in expected for _ in range(STEPS)])


def test_cool_down_holds_the_minimum_and_lengthens_the_run():
    config = make_config(cooldown_epochs=2, cooldown_iters=11)
    schedule = build_scheduler(config, make_optimizer(), steps_per_epoch=STEPS)
    assert schedule.num_epochs == 8 + 2 + 2
    for name, extra in (("cosine", {}), ("step", {"decay_epochs": 3}), ("plateau", {}), ("poly", {"decay_rate": 1.0})):
        values = rates(make_config(name, cooldown_epochs=2, **extra), num_updates=100)
        assert values[80:] == [0.01] * 20, name


def test_one_epoch_and_one_step():
    assert rates(make_config(epoch_full=1), num_updates=10) == pytest.approx([cosine(i / 10) for i in range(10)])
    assert rates(make_config(epoch_full=1, use_iters=False), num_updates=2) == [1.0, 1.0]
    assert rates(make_config(epoch_full=1), num_updates=1, steps=1) == [1.0]
    assert rates(make_config(epoch_full=1, warmup_epochs=1), num_updates=10) == pytest.approx(
        [0.001 + i / 10 * 0.999 for i in range(10)]
    )


def torch_rates(make, num_epochs: int) -> list[float]:
    """Return a torch schedule's rates, the truth for ours, with one value for each of our optimiser steps."""
    optimizer = make_optimizer()
    schedule = make(optimizer)
    values = []
    for _ in range(num_epochs):
        values += [optimizer.param_groups[0]["lr"]] * STEPS
        optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize("use_iters", [True, False])
def test_step_is_torchs(use_iters):
    expected = torch_rates(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), 8)
    config = make_config("step", decay_epochs=3, decay_rate=0.5, use_iters=use_iters)
    assert rates(config, num_updates=80) == pytest.approx(expected)


def test_step_in_iterations():
    values = rates(make_config("step", decay_iters=25, decay_rate=0.5), num_updates=80)
    assert values == pytest.approx([0.5 ** (i // 25) for i in range(80)])


@pytest.mark.parametrize("use_iters", [True, False])
def test_multistep_is_torchs(use_iters):
    expected = torch_rates(lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], 0.5), 8)
    config = make_config("multistep", decay_milestones=[5, 2], decay_rate=0.5, use_iters=use_iters)
    assert rates(config, num_updates=80) == pytest.approx(expected)


def test_poly_and_tanh():
    values = rates(make_config("poly", decay_rate=0.9), num_updates=80)
    assert values == pytest.approx([0.01 + 0.99 * (1 - i / 80) ** 0.9 for i in range(80)])
    values = rates(make_config("tanh"), num_updates=80)
    assert values == pytest.approx([0.01 + 0.5 * 0.99 * (1 - math.tanh(-7 + 10 * i / 80)) for i in range(80)])


def test_none_is_constant_without_warm_up():
    assert rates(make_config("none", warmup_epochs=2, cooldown_epochs=1), num_updates=90) == [1.0] * 90


METRICS = [10.0, 20.0, 20.001, 19.0, 18.0, 25.0, 24.0, 23.0, 22.0, 21.0, 20.0, 26.0]


@pytest.mark.parametrize("use_iters", [True, False])
@pytest.mark.parametrize("patience", [0, 1, 2])
def test_plateau_is_torchs(patience, use_iters):
    expected_optimizer = make_optimizer()
    expected = torch.optim.lr_scheduler.ReduceLROnPlateau(
        expected_optimizer, mode="max", factor=0.5, patience=patience, min_lr=0.01
    )
    optimizer = make_optimizer()
    config = make_config(
        "plateau", epoch_full=len(METRICS), decay_rate=0.5, patience_epochs=patience, use_iters=use_iters
    )
    schedule = build_scheduler(config, optimizer, steps_per_epoch=STEPS)
    for epoch, metric in enumerate(METRICS):
        schedule.step(epoch * STEPS)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected_optimizer.param_groups[0]["lr"])
        schedule.epoch_end(epoch, metric)
        expected.step(metric)
    assert optimizer.param_groups[0]["lr"] < 1.0


def test_plateau_passes_over_warm_up_and_epochs_without_a_test():
    optimizer = make_optimizer()
    config = make_config("plateau", epoch_full=10, warmup_epochs=2, decay_rate=0.5)
    schedule = build_scheduler(config, optimizer, steps_per_epoch=STEPS)
    rates_at_starts = []
    for epoch, metric in enumerate([90.0, 80.0, 10.0, None, None, 9.0, 11.0]):
        schedule.step(epoch * STEPS)
        rates_at_starts.append(optimizer.param_groups[0]["lr"])
        schedule.epoch_end(epoch, metric)
    assert rates_at_starts == pytest.approx([0.001, 0.5005, 1.0, 1.0, 1.0, 1.0, 0.5])


@pytest.mark.parametrize("name", ["cosine", "plateau"])
def test_noise_is_bounded_seeded_and_in_its_range(name):
    config = make_config(name, lr_noise=[0.25, 0.75], noise_pct=0.2, noise_std=0.1)
    clean = rates(make_config(name), num_updates=80)
    noisy = rates(config, num_updates=80)
    assert noisy == rates(config, num_updates=80)
    assert noisy[:20] == clean[:20]
    assert noisy[60:] == clean[60:]
    ratios = [one / other - 1 for one, other in zip(noisy[20:60], clean[20:60], strict=True)]
    assert max(map(abs, ratios)) < 0.2
    assert len(set(ratios)) == 40
    config.trainer.scheduler_kwargs.noise_seed = 43
    assert noisy[20:60] != rates(config, num_updates=80)[20:60]


@pytest.mark.parametrize("name", ["cosine", "plateau", "none"])
def test_layer_scales_hold_through_warm_up_and_cool_down(name):
    optimizer = make_optimizer(scales=(1.0, 0.25))
    schedule = build_scheduler(make_config(name, warmup_epochs=2, cooldown_epochs=1), optimizer, steps_per_epoch=STEPS)
    for update in (0, 13, 20, 55, 85):
        schedule.step(update)
        full, quarter = (group["lr"] for group in optimizer.param_groups)
        assert quarter == 0.25 * full


@pytest.mark.parametrize("name", ["cosine", "plateau"])
@pytest.mark.parametrize("stop", [37, 40])
def test_a_resumed_schedule_is_the_uninterrupted_one(name, stop, tmp_path, caplog):
    def run(schedule, optimizer, start: int, end: int) -> list[float]:
        values = []
        for update in range(start, end):
            schedule.step(update)
            values.append(optimizer.param_groups[0]["lr"])
            if (update + 1) % STEPS == 0:
                schedule.epoch_end(update // STEPS, METRICS[update // STEPS])
        return values

    def start():
        optimizer = make_optimizer()
        config = make_config(name, warmup_epochs=1, decay_rate=0.5, patience_epochs=1, lr_noise=[0.3, 0.9])
        return build_scheduler(config, optimizer, steps_per_epoch=STEPS), optimizer

    whole = run(*start(), 0, 80)
    schedule, optimizer = start()
    first = run(schedule, optimizer, 0, stop)
    torch.save({"schedule": schedule.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    schedule, optimizer = start()
    optimizer.load_state_dict(state["optimizer"])
    with caplog.at_level(logging.WARNING):
        schedule.load_state_dict(state["schedule"])
    assert first + run(schedule, optimizer, stop, 80) == whole
    assert not caplog.records


def test_a_changed_schedule_is_kept_and_told(caplog):
    state = build_scheduler(make_config(epoch_full=8), make_optimizer(), steps_per_epoch=STEPS).state_dict()
    optimizer = make_optimizer()
    schedule = build_scheduler(make_config(epoch_full=12), optimizer, steps_per_epoch=STEPS)
    with caplog.at_level(logging.WARNING):
        schedule.load_state_dict(state)
    assert "t_initial 80 -> 120" in caplog.text
    schedule.step(90)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(cosine(90 / 120))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"warmup_epochs": 9}, r"the warm-up takes 9 epochs, but the run has 8: shorten warmup_epochs"),
        ({"warmup_iters": 81}, r"the warm-up takes 8\.1 epochs, but the run has 8"),
        ({"name": "step"}, "the step schedule needs decay_epochs or decay_iters above 0"),
        ({"name": "multistep"}, "the multistep schedule needs decay_milestones"),
        ({"name": "plateau", "patience_iters": 3}, "set patience_epochs"),
        ({"use_iters": False, "warmup_iters": 3}, "with use_iters=false times are counted in epochs"),
    ],
)
def test_entries_that_do_not_go_together_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        build_scheduler(make_config(**entries), make_optimizer(), steps_per_epoch=STEPS)


def test_an_epoch_without_a_step_is_refused():
    with pytest.raises(ValueError, match="nothing to train: an epoch has no optimiser step"):
        build_scheduler(make_config(), make_optimizer(), steps_per_epoch=0)
