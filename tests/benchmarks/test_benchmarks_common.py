"""Turns, ratios and tables."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks.common import Plan, Timing, _CpuSeconds, _foreign_load, measure, save_result, speedup, table, take_turn


def test_cases_take_turns():
    order = []
    plan = Plan(warmup=0.0, seconds=100.0, runs=6, turns=3)
    timings = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, plan, "cpu")
    warm_up = 2
    assert "".join(order[2 * warm_up :]) == "aabb" * 3
    assert [len(turn) for turn in timings["a"].turns] == [2, 2, 2]


def test_time_ends_a_turn_before_the_runs_do():
    assert len(take_turn(lambda: None, Plan(warmup=0.0, seconds=0.0, runs=50, turns=5), "cpu")) == 1


def test_short_calls_are_repeated_within_a_sample():
    calls = []
    measure({"a": lambda: calls.append(0)}, Plan(warmup=0.0, seconds=1.0, runs=1, turns=1, sample=1.0), "cpu")
    assert len(calls) == 2 + 1000


def test_speedup_is_not_fooled_by_a_slow_spell():
    fast = Timing([[1.0, 1.1, 1.0], [10.0, 10.0], [1.0]])
    slow = Timing([[2.0, 2.0, 9.0], [20.0, 20.0], [2.0]])
    assert speedup(fast, slow) == pytest.approx(2.0)
    assert speedup(slow, fast) == pytest.approx(0.5)


def test_timing_summary():
    timing = Timing([[4.0, 2.0], [3.0]])
    assert timing.median == 3.0
    assert timing.quartiles == (2.5, 3.5)
    assert not timing.is_disturbed
    assert Timing([[1.0]]).quartiles == (1.0, 1.0)


def test_what_others_take_of_the_machine():
    """Of 8 core-seconds 5 were busy, 4 of them ours."""
    before, after = _CpuSeconds(own=1.0, busy=10.0, total=20.0), _CpuSeconds(own=5.0, busy=15.0, total=28.0)
    assert _foreign_load(before, after) == pytest.approx(1 / 8)
    assert _foreign_load(before, before) == 0.0
    assert Timing([[1.0], [1.0]], [0.02, 0.3]).as_dict()["is_disturbed"]
    assert not Timing([[1.0], [1.0]], [0.02, 0.1]).as_dict()["is_disturbed"]


def test_a_result_file_has_a_row_a_line(tmp_path):
    rows = [{"network": "a", "median_s": 0.5}, {"network": "b", "median_s": 0.25}]
    arguments = argparse.Namespace(quick=True, out=tmp_path)
    path = save_result(tmp_path / "network", "network", {"cpu": "x"}, arguments, cases=rows, failures=[])
    text = path.read_text()
    assert json.loads(text) == {
        "benchmark": "network",
        "machine": {"cpu": "x"},
        "settings": {"quick": True},
        "cases": rows,
        "failures": [],
    }
    assert text.count("\n") == 10


def test_table():
    lines = table([("a", 1234.5, None), ("bb", 0.12345, 7)], ("name", "speed", "n")).splitlines()
    assert lines == [
        "| name | speed |  n |",
        "| ---- | ----: | -: |",
        "| a    |  1234 |  - |",
        "| bb   | 0.123 |  7 |",
    ]
