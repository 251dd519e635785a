"""Meters against sums by hand."""

from __future__ import annotations

import pytest
import torch

from configs.schema import LogTerm
from util.distributed import Process
from util.meters import Meter, Meters

TERMS = [
    LogTerm(name="CE", fmt=":>5.3f", add_name="avg"),
    LogTerm(name="hits", fmt=":>4.0f", show_name="sum"),
    LogTerm(name="KD"),
]


def test_value_average_and_sum():
    meters = Meters(TERMS)
    for value, count in ((2.0, 1), (5.0, 3)):
        meters.update({"CE": value, "not shown": 1.0}, count)
    reading = meters.read(Process())["CE"]
    assert (reading.val, reading.avg, reading.sum) == (5.0, 17 / 4, 17.0)


def test_columns_show_what_holds_anything():
    meters = Meters(TERMS)
    meters.update({"CE": 6.98, "hits": torch.tensor(3)})
    meters.update({"CE": 7.0, "hits": torch.tensor(4)})
    assert meters.columns(meters.read(Process())) == "[CE 7.000 (6.990)] [hits    7]"
    meters.reset()
    assert meters.columns(meters.read(Process())) == ""


def test_tensors_sum_in_double_precision():
    meter = Meter()
    for _ in range(3):
        meter.update(torch.tensor(1 + 2**-20, dtype=torch.float32, requires_grad=True), 2**10)
    assert meter.state() == [1 + 2**-20, 3 * 2**10 + 3 * 2**-10, 3 * 2**10]


def test_state_goes_on():
    first, second = Meters(TERMS), Meters(TERMS[:1])
    first.update({"CE": torch.tensor(1.5), "hits": 2})
    second.load_state_dict(first.state_dict())
    for meters in (first, second):
        meters.update({"CE": 2.5})
    assert first.read(Process())["CE"] == second.read(Process())["CE"]


def test_a_format_that_is_none():
    with pytest.raises(ValueError, match=r"'lr'.*':>5.3q'.*':>5.3f'"):
        Meters([LogTerm(name="lr", fmt=":>5.3q")])
