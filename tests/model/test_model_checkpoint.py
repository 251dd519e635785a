"""Reading checkpoints: other files, damaged ones, code, old layouts; which weights are taken."""

from __future__ import annotations

import copy
import fractions
import logging
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import Net, Payload, same, saved
from safetensors.torch import save_file
from torch import nn

from model.checkpoint import load_checkpoint, read_checkpoint, select_state_dict


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    saved(tmp_path, {}, "net_E.pth")
    saved(tmp_path, {}, "latest_ckpt.pth")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*net_e\.pth; the nearest in .*: net_E\.pth"):
        read_checkpoint(tmp_path / "net_e.pth")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere either"):
        read_checkpoint(tmp_path / "nowhere" / "net.pth")


def test_folder_lists_its_files(tmp_path: Path) -> None:
    saved(tmp_path, {}, "net.pth")
    with pytest.raises(ValueError, match=r"is a folder, not a checkpoint: name a file in it \(it holds net\.pth\)"):
        read_checkpoint(tmp_path)


QUOTA_PAGE = b"\n<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"


@pytest.mark.parametrize(
    ("contents", "cause"),
    [
        (b"", "is empty: the download or copy of it failed"),
        (QUOTA_PAGE, r"is a web page \('Google Drive - Quota exceeded'\).*download quota"),
        (b"<html>Sorry</html>", "is a web page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer.*git lfs pull"),
        (b"\x1f\x8b\x08" + bytes(50), "is a gzip archive: unpack it"),
        (bytes(257) + b"ustar" + bytes(250), "is a tar archive: unpack it"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is no checkpoint of torch.save"),
        (b"just some words\n" * 9, "is no checkpoint of torch.save"),
        (pickle.dumps({"net": 1}, protocol=4), "is no checkpoint of torch.save"),
    ],
    ids=["empty", "quota", "html", "lfs", "gzip", "tar", "png", "text", "pickle"],
)
@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_other_file(tmp_path: Path, contents: bytes, cause: str, mmap: bool) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=rf"net\.pth {cause}") as caught:
        read_checkpoint(path, mmap=mmap)
    assert "weights_only=False" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.95])
def test_truncated(tmp_path: Path, zipped: bool, kept: float) -> None:
    path = saved(tmp_path, {"net": Net().state_dict()}, _use_new_zipfile_serialization=zipped)
    contents = path.read_bytes()
    path.write_bytes(contents[: int(len(contents) * kept)])
    with pytest.raises(
        ValueError, match=r"file\.pth is (truncated or damaged|no checkpoint of torch.save, or a damaged)"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
def test_flipped_bit_in_a_weight(tmp_path: Path, mmap: bool) -> None:
    weight = torch.arange(1000.0)
    path = saved(tmp_path, {"weight": weight})
    contents = bytearray(path.read_bytes())
    contents[contents.index(weight.numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"is truncated or damaged .*Bad CRC-32"):
        read_checkpoint(path, mmap=mmap)


def test_file_without_checksums_loads(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, {"weight": torch.arange(5.0)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(path)["weight"], torch.arange(5.0))


def test_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    source = saved(tmp_path, {"weight": torch.zeros(10)})
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(ValueError, match=r"a\.pth is a zip archive, but not a checkpoint"):
        read_checkpoint(tmp_path / "a.pth")


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is a pipe or a device"):
        read_checkpoint(tmp_path / "a.pth")


def test_other_zip_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "arrays.npz", weight=np.zeros(3))
    with pytest.raises(ValueError, match=r"is a zip archive, but not a checkpoint"):
        read_checkpoint(tmp_path / "arrays.npz")


@pytest.mark.parametrize("contents", [[1, 2], torch.zeros(2)], ids=["list", "tensor"])
def test_no_dictionary(tmp_path: Path, contents: object) -> None:
    with pytest.raises(ValueError, match=r"file\.pth holds a (list|Tensor), not the dictionary"):
        read_checkpoint(saved(tmp_path, contents))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "marker"
    contents = {"net": Net().state_dict(), "extra": Payload(marker)}
    path = saved(tmp_path, contents, _use_new_zipfile_serialization=zipped)
    network = Net()
    before = copy.deepcopy(network.state_dict())
    for read in (read_checkpoint, lambda path: load_checkpoint(network, path, strict=False)):
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} holds code .*asks for \w+\.system"):
            read(path)
    assert not marker.exists()
    assert same(network.state_dict(), before)
    torch.load(path, weights_only=False)  # the payload is a working one
    assert marker.exists()


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bare_pickle_is_not_run(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(pickle.dumps({"net": Payload(tmp_path / "marker")}, protocol=protocol))
    with pytest.raises(ValueError, match=r"file\.pth (holds code|is no checkpoint)"):
        read_checkpoint(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(fractions.Fraction(1, 2), "fractions.Fraction"), (nn.Linear(2, 2), "torch.nn.modules.linear.Linear")],
    ids=["fraction", "module"],
)
def test_object_is_refused_by_name(tmp_path: Path, value: object, wanted: str) -> None:
    path = saved(tmp_path, {"net": Net().state_dict(), "value": value})
    with pytest.raises(ValueError, match=f"asks for {re.escape(wanted)},.*save its state dict"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "file.pth"))
    with pytest.raises(ValueError, match=r"holds code \(a TorchScript program\)"):
        read_checkpoint(tmp_path / "file.pth")


def rename_in_pickle(path: Path, old: bytes, new: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in records.items():
            if name.endswith("data.pkl"):
                assert old in contents or new in contents
                contents = contents.replace(old, new)
            archive.writestr(name, contents)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"], ids=["numpy1", "numpy2"])
def test_numpy_scalars_of_old_training_checkpoints(tmp_path: Path, module: bytes) -> None:
    scores = [np.float64(73.25), np.float32(0.5), np.int64(-3), np.bool_(True), np.str_("top1")]
    weights = OrderedDict(Net().state_dict())
    path = saved(tmp_path, {"net": weights, "metric_recorder": {"scores": scores}, "optimizer": {"state": {0: {}}}})
    rename_in_pickle(path, np.float64(0).__reduce__()[0].__module__.encode(), module)
    checkpoint = read_checkpoint(path)
    assert checkpoint["metric_recorder"]["scores"] == [73.25, 0.5, -3, True, "top1"]
    assert same(select_state_dict(checkpoint, ema=False)[0], weights)


def test_allowed_names_do_not_stay_allowed(tmp_path: Path) -> None:
    path = saved(tmp_path, {"score": np.float64(1)})
    read_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_numpy_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds code .*asks for numpy\.\w+\.multiarray\._reconstruct"):
        read_checkpoint(saved(tmp_path, {"array": np.zeros(2)}))


def test_legacy_and_safetensors_files(tmp_path: Path) -> None:
    weights = Net().state_dict()
    assert same(read_checkpoint(saved(tmp_path, weights, _use_new_zipfile_serialization=False), mmap=True), weights)
    save_file(weights, tmp_path / "file.safetensors")
    read = read_checkpoint(tmp_path / "file.safetensors")
    assert same({name: read[name] for name in weights}, weights)
    (tmp_path / "file.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"file\.safetensors is truncated, damaged or no safetensors"):
        read_checkpoint(tmp_path / "file.safetensors")


PLAIN, AVERAGED = {"a": torch.tensor(0.0)}, {"a": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("checkpoint", "ema", "source"),
    [
        ({"net": PLAIN, "net_E": AVERAGED, "epoch": 3}, False, "net"),
        ({"net": PLAIN, "net_E": AVERAGED, "epoch": 3}, True, "net_E"),
        ({"net": PLAIN, "net_E": None}, False, "net"),
        ({"model": PLAIN, "optimizer": {}}, False, "model"),
        ({"state_dict": PLAIN, "meta": {}}, False, "state_dict"),
        ({"state_dict": PLAIN, "state_dict_ema": AVERAGED}, True, "state_dict_ema"),
        ({"model": PLAIN, "model_ema": AVERAGED}, True, "model_ema"),
        ({"net_E": AVERAGED}, False, "net_E"),
        (PLAIN, False, "bare"),
        (AVERAGED, True, "bare"),
    ],
)
def test_rule_of_choice(checkpoint: dict, ema: bool, source: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        weights, taken = select_state_dict(checkpoint, ema=ema, origin="some.pth")
    assert taken == source
    assert weights["a"] is checkpoint.get(source, checkpoint)["a"]
    assert ("some.pth holds averaged weights only: taking net_E" in caplog.text) == (source == "net_E" and not ema)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_stripped(prefix: str) -> None:
    weights, _ = select_state_dict({"net": {f"{prefix}a": PLAIN["a"], f"{prefix}module.b": PLAIN["a"]}}, ema=False)
    assert list(weights) == ["a", "module.b"]


@pytest.mark.parametrize(
    ("checkpoint", "ema", "cause"),
    [
        ({"net": PLAIN, "net_E": None, "epoch": 1}, True, r"x\.pth holds no averaged weights .*only net, net_E, epoch"),
        (
            {"epoch": 1, "lr": 0.1},
            False,
            r"x\.pth holds no weights, only epoch, lr: name a file with one of net, model",
        ),
        ({}, False, "holds no weights, only nothing"),
        ({"net": {"a": 1.0}}, False, r"x\.pth \(net\): entry 'a' is a float, not a tensor"),
        ({"a": torch.zeros(1), "epoch": 2}, False, "entry 'epoch' is a int"),
        ({"net": {3: torch.zeros(1)}}, False, r"x\.pth \(net\): entry 3 is named by a int, not by a text"),
        ({"net": {"a": torch.zeros(2).to_sparse()}}, False, "entry 'a' is sparse, quantized or without data"),
        ({"net": {"a": torch.zeros(2, device="meta")}}, False, "entry 'a' is sparse, quantized or without data"),
    ],
)
def test_no_weights(checkpoint: dict, ema: bool, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        select_state_dict(checkpoint, ema=ema, origin="x.pth")
