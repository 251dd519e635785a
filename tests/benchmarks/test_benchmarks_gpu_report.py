"""The report for a GPU, in small and on the CPU: every section runs, and what fails is noted. No time is asserted."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu_checks, gpu_report
from model.lib_mamba import set_backend

SHORT = ["--quick", "--device", "cpu", "--threads", "1", "--warmup", "0", "--seconds", "0", "--runs", "1"]


@pytest.fixture(autouse=True)
def restored_backend():
    yield
    set_backend(None)


def report(tmp_path, *options):
    arguments = gpu_report.parse([*SHORT, "--out", str(tmp_path), *options])
    result = gpu_report.run(arguments)
    (path,) = tmp_path.glob("gpu-report-*-quick.json")
    assert json.loads(path.read_text())["sections"].keys() == result["sections"].keys()
    return result["sections"]


def test_every_section_runs(tmp_path, capsys):
    sections = report(tmp_path)
    assert list(sections) == list(gpu_report.SECTIONS)
    assert {name: section["failure"] for name, section in sections.items() if section["failure"]} == {}
    for name, section in sections.items():
        assert section["rows"], name
        assert all(row["passed"] is not False for row in section["rows"]), name
    assert {row["what"] for row in sections["core"]["rows"]} >= {"floor", "reference"}
    assert {(row["type"], row["L"]) for row in sections["exactness"]["rows"]} == {
        *((dtype, length) for dtype in ("float32", "bfloat16") for length in gpu_report.QUICK.lengths),
        ("float16", gpu_report.QUICK.lengths[0]),
    }
    assert "In short" in capsys.readouterr().out


def test_a_section_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setitem(gpu_report.SECTIONS, "core", fail)
    sections = report(tmp_path, "--sections", "core", "backends", "--backends", "reference")
    assert sections["core"]["failure"] == "RuntimeError: no kernel image"
    assert [row["backend"] for row in sections["backends"]["rows"]] == ["reference"]
    monkeypatch.setattr(gpu_report, "run", lambda arguments: {"sections": sections})
    assert gpu_report.main(SHORT) == 1


def test_wrong_results_are_noticed(monkeypatch):
    monkeypatch.setattr(gpu_checks, "TOLERANCES", dict.fromkeys(gpu_checks.TOLERANCES, (0.0, 0.0)))
    assert not any(row["passed"] for row in gpu_checks.exactness("cpu", ["reference"], (3,)))


def test_without_a_gpu_it_has_to_be_the_quick_one(capsys):
    with pytest.raises(SystemExit):
        gpu_report.parse(["--device", "cpu"])
    assert "--device cpu --quick" in capsys.readouterr().err
