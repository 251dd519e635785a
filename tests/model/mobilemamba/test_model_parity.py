"""Names, shapes, logits, features, gradients: the released network's own numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model import create_model
from model.lib_mamba import SS2D
from model.mobilemamba import VARIANTS
from model.mobilemamba.blocks import Block, PatchMerging
from model.mobilemamba.fuse import fuse
from model.mobilemamba.wavelet import WTEMamba

UNITS = {
    "ss2d_32x6x5": lambda: SS2D(32),
    "ss2d_16x3x3": lambda: SS2D(16),
    "wtemamba_32x7x5": lambda: WTEMamba(32, 5),
    "wtemamba_16x4x3": lambda: WTEMamba(16, 5),
    "patchmerging_24to40": lambda: PatchMerging(24, 40),
    "block_64": lambda: Block(64, global_ratio=0.8, local_ratio=0.2, kernel_size=7),
}
CASES = ["T2_2x192x192_seed0", "T2_1x160x224_seed1", "B1_1x256x256_seed0"]


def relative_error(actual, expected):
    expected = torch.as_tensor(expected)
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def figures_of(parity_arrays):
    """Return a function that selects the figures of one unit or case, and drops its name from theirs."""

    def select(file, owner):
        arrays = parity_arrays(file)
        return {name.removeprefix(f"{owner}_"): arrays[name] for name in arrays if name.startswith(f"{owner}_")}

    return select


def released_entries(name):
    """B2 and B4 are B1 at other image sizes: the kit lists it once."""
    return "MobileMamba_B1" if name in ("MobileMamba_B2", "MobileMamba_B4") else name


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_are_the_published_ones(name, parity_json):
    parameters = list(create_model(name).parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    published = parity_json("state_dict.json")
    assert sum(parameter.numel() for parameter in parameters) == published[f"{released_entries(name)}#params"]
    assert trainable == published[f"{released_entries(name)}#trainable"]


@pytest.mark.parametrize("name", VARIANTS)
def test_state_dict_has_the_released_names_and_shapes(name, parity_json):
    expected = parity_json("state_dict.json")[released_entries(name)]
    assert {key: list(value.shape) for key, value in create_model(name).state_dict().items()} == expected


def test_no_unit_and_no_case_of_the_kit_is_left_out(parity_arrays):
    assert [name for name in parity_arrays("units.npz") if not name.startswith(tuple(UNITS))] == []
    assert [name for name in parity_arrays("model_eval.npz") if not name.startswith(tuple(CASES))] == []


def backward(y):
    """Differentiate the kit's loss."""
    (y * torch.arange(y.numel()).cos().view_as(y)).sum().backward()


@pytest.mark.parametrize("unit", UNITS)
def test_unit_output_and_gradients(unit, parity_fill, figures_of):
    expected = figures_of("units.npz", unit)
    module = parity_fill.fill_(UNITS[unit]()).eval()
    x = torch.from_numpy(expected.pop("x")).requires_grad_()

    y = module(x)
    backward(y)

    assert relative_error(y.detach(), expected.pop("y")) < 2e-6
    gradients = {f"grad_{name}": value.grad for name, value in module.named_parameters() if value.requires_grad}
    gradients["dx"] = x.grad
    assert gradients.keys() == expected.keys()
    errors = {name: relative_error(gradient, expected[name]) for name, gradient in gradients.items()}
    assert {name: error for name, error in errors.items() if error > 5e-6} == {}


@pytest.mark.parametrize("unit", UNITS)
def test_folded_unit_output_and_gradient_of_the_input(unit, parity_fill, figures_of):
    expected = figures_of("units.npz", unit)
    module = fuse(nn.Sequential(parity_fill.fill_(UNITS[unit]())))
    x = torch.from_numpy(expected["x"]).requires_grad_()

    backward(module(x))
    with torch.no_grad():
        y = module(x)

    assert relative_error(y, expected["y"]) < 2e-6
    assert relative_error(x.grad, expected["dx"]) < 5e-6


@pytest.mark.parametrize("is_folded", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_features(case, is_folded, parity_fill, figures_of):
    expected = figures_of("model_eval.npz", case)
    variant, shape, seed = case.split("_")
    images = parity_fill.image(*map(int, shape.split("x")), int(seed.removeprefix("seed")))
    network = parity_fill.fill_(create_model(f"MobileMamba_{variant}")).eval()
    if is_folded:
        network.fuse()

    with torch.no_grad():
        logits = network(images)
        features = network.forward_intermediates(images, intermediates_only=True)

    assert relative_error(logits, expected.pop("logits")) < 2e-5
    assert len(expected) == 2 * len(features)
    for index, feature in enumerate(features):
        assert tuple(feature.shape) == tuple(expected[f"feat{index}_shape"])
        assert relative_error(feature.mean((0, 2, 3)), expected[f"feat{index}_channel_mean"]) < 2e-5


@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "tolerance", "rounding"),
    [(torch.float32, 1e-6, 1e-3, 1e-5), (torch.float64, 1e-7, 1e-5, 1e-14)],
    ids=["float32", "float64"],
)
def test_training_step(dtype, loss_tolerance, tolerance, rounding, parity_fill, parity_json):
    """In the kit's own float64, and in float32: scales in front of a batch norm over four images magnify rounding."""
    expected = parity_json("train_step_T2.json")
    variant, batch, height, width, seed = expected["case"]
    network = parity_fill.fill_(create_model(f"MobileMamba_{variant}", drop_path=0.0).to(dtype)).train()
    images = parity_fill.image(batch, height, width, seed).to(dtype)

    loss = nn.functional.cross_entropy(network(images), torch.arange(batch) * 7 % 1000)
    loss.backward()

    assert loss.item() == pytest.approx(expected["loss"], rel=loss_tolerance)
    norms = {name: value.grad.norm().item() for name, value in network.named_parameters() if value.requires_grad}
    # A bias in front of a batch norm has no gradient but rounding, hence the absolute part.
    assert norms == pytest.approx(expected["grad_norm"], rel=tolerance, abs=rounding)


def test_an_image_does_not_depend_on_its_batch(parity_fill):
    network = parity_fill.fill_(create_model("MobileMamba_T2")).eval()
    images = parity_fill.image(3, 96, 64, 5)
    with torch.no_grad():
        together = network(images)
        one_by_one = torch.cat([network(image[None]) for image in images])
    assert relative_error(together, one_by_one) < 2e-6
