"""BatchNorm statistics that are kept, put back and named; over processes see the tests of two ranks."""

from __future__ import annotations

import torch
from torch import nn
from trainer_cases import assert_same

from trainer.batchnorm import StatisticsKeeper, batch_norm_statistics, equalise_statistics
from util.distributed import Process


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)), nn.LayerNorm(5))


def test_statistics_are_the_buffers_of_batch_norm_only():
    names = [
        f"{module}.{key}" for module in ("1", "2.0") for key in ("running_mean", "running_var", "num_batches_tracked")
    ]
    assert list(batch_norm_statistics(network())) == names


def test_what_was_kept_comes_back():
    net = network()
    images = torch.randn(2, 3, 5, 5)
    net(images)
    keeper = StatisticsKeeper(net)
    keeper.keep()
    before = {name: value.clone() for name, value in batch_norm_statistics(net).items()}
    net(images * float("nan"))
    assert not batch_norm_statistics(net)["1.running_mean"].isfinite().any()
    keeper.restore()
    assert_same(batch_norm_statistics(net), before)


def test_a_network_without_batch_norm():
    keeper = StatisticsKeeper(nn.Linear(2, 2))
    keeper.keep()
    keeper.restore()


def test_one_process_has_nothing_to_equalise():
    net = network()
    net(torch.randn(2, 3, 5, 5))
    before = {name: value.clone() for name, value in batch_norm_statistics(net).items()}
    equalise_statistics(net, "reduce", Process())
    assert_same(batch_norm_statistics(net), before)
