"""A network gives PyTorch's answers in every runtime, and the script that times them lists what does not run."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import runtimes
from benchmarks.networks import Candidate, settle
from benchmarks.runners import RUNTIMES, Preparation
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
    preparation = Preparation(candidate, 2, tmp_path, 1)
    run, error = preparation.prepare("onnxruntime", "fp32")
    assert error < 1e-5
    assert run().shape == (2, 10)
    _, error = preparation.prepare("onnxruntime", "int8")
    assert 1e-4 < error < 0.3
    sizes = {path.name.rpartition("-")[2]: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["int8.onnx"] < 0.4 * sizes["fp32.onnx"]


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


def test_cases_are_those_that_make_sense():
    arguments = runtimes.parse(["--device", "cpu", "--compile"])
    assert arguments.runtimes == [*(name for name in RUNTIMES if name != "compile"), "compile"]
    assert arguments.networks[-3:] == ["efficientvit_m5", "mobilenetv4_conv_medium", "repvit_m1_0"]
    peer = Candidate("repvit_m1_0", "peer", torch.nn.Identity(), 224, 0)
    cases = {(case.runtime, case.precision) for case in runtimes._cases(peer, arguments)}
    exported = {(runtime, precision) for runtime in ("onnxruntime", "openvino") for precision in ("fp32", "int8")}
    assert cases == {("eager", "fp32"), ("compile", "fp32"), *exported}
