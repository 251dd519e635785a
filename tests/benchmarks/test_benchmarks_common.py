"""Turns, ratios and tables."""

from __future__ import annotations

import pytest

from benchmarks.common import Plan, Timing, measure, speedup, table, take_turn


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
    assert timing.as_dict()["turn_medians_s"] == [3.0, 3.0]
    assert Timing([[1.0]]).quartiles == (1.0, 1.0)


def test_table():
    lines = table([("a", 1234.5, None), ("bb", 0.12345, 7)], ("name", "speed", "n")).splitlines()
    assert lines == [
        "| name | speed |  n |",
        "| ---- | ----: | -: |",
        "| a    |  1234 |  - |",
        "| bb   | 0.123 |  7 |",
    ]
