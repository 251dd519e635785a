"""A network gives PyTorch's answers in every runtime, and the script that times them lists what does not run."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from benchmarks import runtimes
from benchmarks.networks import Candidate, settle
from benchmarks.runners import RUNTIMES, Preparation
from benchmarks.runtimes_table import main, tables
from model import create_model

SHORT = ["--quick", "--device", "cpu", "--threads", "1", "--warmup", "0", "--seconds", "0", "--runs", "1"]


@pytest.fixture(scope="module")
def candidate():
    torch.manual_seed(0)
    network = settle(create_model("MobileMamba_T2", num_classes=10)).fuse()
    return Candidate("MobileMamba_T2", "ours", network, 64, 0)


def test_a_quantised_file_answers_nearly_alike(candidate, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    preparation = Preparation(candidate, 2, tmp_path, 1, num_images=3)
    whole = preparation.prepare("onnxruntime", "fp32")
    assert whole.error < 1e-5
    assert whole.decibels > 100
    assert (whole.agreement, whole.num_images) == (1, 4)
    assert whole.run().shape == (2, 10)
    assert whole.num_bytes == (tmp_path / "MobileMamba_T2-2-onnx-fp32" / "network.onnx").stat().st_size
    quantised = preparation.prepare("onnxruntime", "int8")
    assert 1e-4 < quantised.error < 0.3
    # By hand, of the answers to the first two pictures, all of which the runtime was given.
    actual, expected = quantised.run(), preparation.expected[:2].numpy()
    assert 10 * np.log10(np.square(expected).sum() / np.square(actual - expected).sum()) == pytest.approx(
        quantised.decibels, abs=6
    )
    assert quantised.num_bytes < 0.4 * whole.num_bytes


def test_a_runtime_that_answers_otherwise_is_refused(candidate, tmp_path):
    preparation = Preparation(candidate, 1, tmp_path, 1)
    preparation.expected = preparation.expected + 1
    with pytest.raises(RuntimeError, match="in eager is off by"):
        preparation.prepare("eager")
    with pytest.raises(ValueError, match="eager runs in fp32, not in int8"):
        preparation.prepare("eager", "int8")


def test_the_script_lists_what_runs_and_what_does_not(tmp_path, monkeypatch):
    def prepare(self, runtime, precision):
        if runtime == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'\nand more")
        return original(self, runtime, precision)

    original = Preparation.prepare
    monkeypatch.setattr(Preparation, "prepare", prepare)
    names = ("--networks", "MobileMamba_T2", "mobilenetv4_conv_medium", "--runtimes", "eager", "onnxruntime")
    runtimes.run(runtimes.parse([*SHORT, "--turns", "2", "--batches", "1", "--out", str(tmp_path), *names]))
    (path,) = tmp_path.glob("runtimes-*-quick.json")
    assert path.with_suffix(".png").stat().st_size > 1000
    result = json.loads(path.read_text())
    assert result["machine"]["load_average"] >= 0
    assert [(row["network"], row["runtime"], row["precision"]) for row in result["cases"]] == [
        ("MobileMamba_T2", "eager", "fp32"),
        ("mobilenetv4_conv_medium", "eager", "fp32"),
    ]
    assert all(row["over_eager"] == 1 for row in result["cases"])
    assert {row["reason"] for row in result["failures"]} == {"No module named 'onnxruntime'"}
    assert {row["precision"] for row in result["failures"]} == {"fp32", "int8"}
    table = tables([result])
    assert "- onnxruntime fp32 of MobileMamba_T2, onnxruntime int8 of MobileMamba_T2, onnxruntime fp32 of" in table
    assert re.search(r"\| eager +\| fp32 +\| +- \| +\S+e\S+ \| +\S+ \| +16/16 \| +[\d.]+ \|", table)


def test_cases_are_those_that_make_sense():
    assert set(runtimes.parse(["--device", "cpu", "--runtimes", "all"]).runtimes) == {*RUNTIMES} - {"compile"}
    arguments = runtimes.parse(["--device", "cpu", "--compile"])
    assert arguments.runtimes == ["eager", "kernels", "onnxruntime", "openvino", "compile"]
    assert arguments.networks[-3:] == ["efficientvit_m5", "mobilenetv4_conv_medium", "repvit_m1_0"]
    peer = Candidate("repvit_m1_0", "peer", torch.nn.Identity(), 224, 0)
    cases = {(case.runtime, case.precision) for case in runtimes._cases(peer, arguments)}
    exported = {(runtime, precision) for runtime in ("onnxruntime", "openvino") for precision in ("fp32", "int8")}
    assert cases == {("eager", "fp32"), ("compile", "fp32"), *exported}


def test_the_tables_join_results_by_network(tmp_path, capsys):
    machine = {"cpu": "A", "cpu_features": ["avx2"], "threads": 2, "cores": 2, "python": "3.11", "torch": "2.11"}
    machine |= {"revision": "abc", "load_average": 0.1, "date": "2026-11-28T10:00:00", "packages": {"ncnn": "1.0"}}
    way = {"network": "MobileMamba_T2", "precision": "fp32"}
    row = {**way, "runtime": "ncnn", "batch": 1, "images_per_s": 81.23, "num_bytes": 35_100_000, "error": 6.8e-7}
    row |= {"decibels": 120.04, "agreement": 1.0, "num_images": 16}
    one = {"machine": machine, "cases": [row], "failures": [{**way, "runtime": "ncnn", "batch": 16, "reason": "no"}]}
    package = {**way, "runtime": "coreml", "batch": 1, "num_bytes": 18_000_000}
    other = {"machine": machine, "cases": [{**row, "images_per_s": 90.0}], "converted": [package], "failures": []}
    for name, content in (("one", one), ("other", other)):
        (tmp_path / name).write_text(json.dumps(content))
    main([str(tmp_path / "one"), str(tmp_path / "other")])
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[2] == ["ncnn", "fp32", "35.1", "6.8e-07", "120.0", "16/16", "90"]
    assert cells[3] == ["coreml", "fp32", "18.0", "converted, not run", "", "", "-"]
    assert lines[-1] == "- ncnn fp32 batch 16: no"
