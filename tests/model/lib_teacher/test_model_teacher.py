"""The teacher of the recipes: built, loaded from files in the published naming, and refused with a reason."""

from __future__ import annotations

import pytest
import torch

from model import create_model
from model.lib_teacher import create_teacher

SMALL = {"num_classes": 10, "layers": [1, 2, 1, 1], "width_factor": 0.25}


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename timm's entries to those of the published checkpoint: sequences of convolution and in-place ABN."""
    renamed = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue  # in-place ABN does not count batches
        is_strided = name.startswith(("body.layer2.0.conv2", "body.layer3.0.conv2", "body.layer4.0.conv2"))
        inner = ".0" if is_strided else ""  # there blur pooling follows as a second entry
        for own, original in ((".conv.", ".0."), (".bn.", ".1.")):
            name = name.replace(own, inner + original)
        renamed[name] = value
    return renamed


def test_the_teacher_of_the_recipes():
    teacher = create_teacher("tresnet_l_v2").eval()
    num_parameters = sum(parameter.numel() for parameter in teacher.parameters())
    assert round(num_parameters / 1e6, 2) == 46.17  # timm's figure
    with torch.no_grad():
        assert teacher(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


def test_tresnet_with_weights_in_the_published_naming(tmp_path):
    source = create_teacher("tresnet_l_v2", **SMALL).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name.endswith("bn.weight"):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path / "tresnet_l_v2_83_9.pth"
    torch.save({"state_dict": original_names(source.state_dict())}, path)

    teacher = create_teacher("TResNet_L_v2", **SMALL, checkpoint_path=str(path)).eval()

    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name.endswith("bn.weight"):
                parameter.copy_(parameter.abs() + 1e-5)  # in-place ABN scales by the absolute value
        images = torch.rand(1, 3, 64, 64, generator=generator)
        torch.testing.assert_close(teacher(images), source(images), rtol=0, atol=0)
    assert teacher(images).shape == (1, 10)


def test_a_checkpoint_that_was_read_already_and_wears_a_prefix(tmp_path):
    source = create_teacher("tresnet_l_v2", **SMALL)
    state = {f"model.{name}": value for name, value in original_names(source.state_dict()).items()}
    path = tmp_path / "teacher.ckpt"
    path.write_bytes(b"not read again")
    teacher = create_model("tresnet_l_v2", **SMALL, checkpoint_path=path, checkpoint={"state_dict": state})
    assert torch.equal(teacher.head.fc.weight, source.head.fc.weight)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    teacher = create_teacher("tresnet_l_v2", **SMALL)
    state = original_names(teacher.state_dict())
    state["head.fc.weight"] = state["head.fc.weight"][:7]
    del state["body.conv1.0.weight"]
    path = tmp_path / "teacher.pth"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"teacher\.pth \(bare\) does not fit the teacher") as caught:
        create_teacher("tresnet_l_v2", **SMALL, checkpoint_path=str(path))
    assert "1 missing from the file: body 1 (body.conv1.conv.weight)" in str(caught.value)
    assert "head.fc.weight 7x512 for 10x512" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tresnet_m", {}, "no teacher named 'tresnet_m'; known: tresnet_l_v2"),
        (
            "tresnet_l_v2",
            {"checkpoint_path": "none/t.pth"},
            r"no checkpoint none/t\.pth\. .*`tresnet_v2_l` with model_kwargs\.pretrained=true",
        ),
        (
            "tresnet_l_v2",
            {"pretrained": True, "num_classes": 10},
            "for 1000 classes, and a head for 10 would be random",
        ),
    ],
)
def test_teachers_that_cannot_be_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_teacher(name, **arguments)


def test_a_failed_download_says_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(ValueError, match=r"could not be fetched \(OSError: no network\).*checkpoint_path"):
        create_teacher("tresnet_l_v2", pretrained=True, checkpoint_path="none/t.pth")
