"""Every optimiser of timm by its name, its arguments and its groups of parameters."""

from __future__ import annotations

import pytest
import timm.optim
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from configs import load_config
from configs.schema import Config
from model.lib_mamba import SS2D
from optim import build_optimizer, no_decay_names, parameter_groups


class Layer(nn.Module):
    """Two layers' worth of the parameter shapes that matter for weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dt_projs_bias = nn.Parameter(torch.zeros(2, 6))
        self.A_logs = nn.Parameter(torch.zeros(6, 1))
        self.bias_table = nn.Parameter(torch.zeros(2, 6))
        self.wt_filter = nn.Parameter(torch.ones(6, 1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x) * self.A_logs.exp().T) + self.dt_projs_bias.sum(0) + self.bias_table.sum(0)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


class ListingNetwork(Network):
    def no_weight_decay(self) -> set[str]:
        return {"blocks.0.A_logs"}


class LayeredNetwork(Network):
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}


def make_config(name: str = "adamw", **entries) -> Config:
    config = Config()
    config.optim.lr = 3e-3
    config.optim.optim_kwargs.name = name
    config.optim.optim_kwargs.weight_decay = 0.05
    for entry, value in entries.items():
        setattr(config.optim.optim_kwargs, entry, value)
    return config


def group_names(network: nn.Module, groups: list[dict], weight_decay: float) -> set[str]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names[id(p)] for group in groups if group["weight_decay"] == weight_decay for p in group["params"]}


DECAYED = {
    "blocks.0.linear.weight",
    "blocks.0.A_logs",
    "blocks.0.bias_table",
    "blocks.1.linear.weight",
    "blocks.1.A_logs",
    "blocks.1.bias_table",
    "head.weight",
}


def test_weight_decay_spares_vectors_and_biases_of_any_shape_and_frozen_ones_stay_out():
    network = Network()
    groups = parameter_groups(network, weight_decay=0.05)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert group_names(network, groups, 0.05) == DECAYED
    assert group_names(network, groups, 0.0) == trained - DECAYED
    assert "blocks.0.dt_projs_bias" in group_names(network, groups, 0.0)


def test_the_network_may_spare_more():
    network = ListingNetwork()
    assert group_names(network, parameter_groups(network, weight_decay=0.05), 0.05) == DECAYED - {"blocks.0.A_logs"}
    assert "blocks.1.A_logs" not in no_decay_names(network)


def test_a_network_without_trained_parameters_is_refused():
    with pytest.raises(ValueError, match="Network has no parameter that requires a gradient"):
        parameter_groups(Network().requires_grad_(False), weight_decay=0.05)


def test_layer_decay_scales_from_the_head_down_and_keeps_the_split():
    network = LayeredNetwork()
    config = make_config()
    config.optim.layer_decay = 0.5
    groups = build_optimizer(config, network).param_groups
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales["head.weight"] == scales["head.bias"] == 1.0
    assert scales["blocks.1.linear.weight"] == scales["blocks.1.dt_projs_bias"] == 0.5
    assert scales["blocks.0.linear.weight"] == scales["blocks.0.norm.bias"] == 0.25
    assert group_names(network, groups, 0.05) == DECAYED


def test_layer_decay_needs_layers():
    with pytest.raises(ValueError, match=r"optim\.layer_decay=0\.5 needs .* Network has no group_matcher"):
        parameter_groups(Network(), weight_decay=0.05, layer_decay=0.5)


def test_the_recipe_is_torchs_adamw():
    network, reference_network = Network(), Network()
    reference_network.load_state_dict(network.state_dict())
    optimizer = build_optimizer(make_config(), network)
    assert type(optimizer) is torch.optim.AdamW
    decayed = [p for name, p in reference_network.named_parameters() if name in DECAYED]
    spared = [p for name, p in reference_network.named_parameters() if name not in DECAYED and p.requires_grad]
    reference = torch.optim.AdamW(
        [{"params": spared, "weight_decay": 0.0}, {"params": decayed}],
        lr=3e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.05,
        amsgrad=False,
    )
    for own, expected in zip(optimizer.param_groups, reference.param_groups, strict=True):
        assert own.pop("fused") is True  # one pass on a CPU, the same numbers
        assert expected.pop("fused") is None
        assert {k: v for k, v in own.items() if k != "params"} == {k: v for k, v in expected.items() if k != "params"}
        own["fused"], expected["fused"] = True, None
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        # Given, not computed: a weight before a batch norm has hardly any gradient but rounding, which Adam scales up.
        for own, expected in zip(network.parameters(), reference_network.parameters(), strict=True):
            if own.requires_grad:
                own.grad = torch.randn(own.shape, generator=generator)
                expected.grad = own.grad.clone()
        optimizer.step()
        reference.step()
    for own, expected in zip(network.parameters(), reference_network.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


def is_here(name: str) -> bool:
    return not isinstance(timm.optim.get_optimizer_info(name).opt_class, str)


def mark(name: str):
    return pytest.param(name, marks=pytest.mark.slow if name.startswith("kron") else ())  # kron compiles


NAMES = [*filter(is_here, timm.optim.list_optimizers()), "lookahead_adamw", "AdamW"]


@pytest.mark.parametrize("name", [mark(name) for name in NAMES])
def test_every_name_alone_builds_an_optimizer_that_steps(name, request):
    if name.startswith("kron"):
        request.getfixturevalue("inductor")
    network = Network()
    config = make_config(name)
    config.loss.create_graph = "hessian" in name
    optimizer = build_optimizer(config, network)
    before = network.head.weight.detach().clone()
    for seed in range(2):
        images = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        network(images).square().mean().backward(create_graph=config.loss.create_graph)
        optimizer.step()
        optimizer.zero_grad()
    assert network.head.weight.isfinite().all()
    assert not torch.equal(network.head.weight, before)


def test_a_resolved_configuration_needs_no_more_than_the_name():
    for name in ("adamw", "sgd", "adan", "adafactor"):
        config = load_config("configs/mobilemamba/mobilemamba_t2", [f"optim.optim_kwargs.name={name}"], world_size=8)
        optimizer = build_optimizer(config, Network())
        assert optimizer.param_groups[0]["lr"] == 3e-3


def test_arguments_reach_the_optimizers_that_take_them():
    adam = build_optimizer(make_config("adam", betas=[0.8, 0.95], eps=1e-6, amsgrad=True), Network())
    assert (adam.defaults["betas"], adam.defaults["eps"], adam.defaults["amsgrad"]) == ((0.8, 0.95), 1e-6, True)
    sgd = build_optimizer(make_config("sgd", momentum=0.8, nesterov=False, extra={"dampening": 0.1}), Network())
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"], sgd.defaults["dampening"]) == (0.8, False, 0.1)
    assert build_optimizer(make_config("sgd"), Network()).defaults["momentum"] == 0.9
    lion = build_optimizer(make_config("lion"), Network())
    assert lion.defaults["betas"] == (0.9, 0.999)
    own = build_optimizer(make_config("lion", betas=None), Network())
    assert own.defaults["betas"] == (0.9, 0.99)
    assert build_optimizer(make_config("adan"), Network()).defaults["betas"] == (0.98, 0.92, 0.99)


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("adamww", {}, "there is no optimiser 'adamww'; the nearest is 'adamw'"),
        ("foo_adamw", {}, "there is no optimiser 'foo_adamw'"),
        ("sgd", {"betas": [0.8, 0.9]}, r"sgd does not take optim\.optim_kwargs\.betas=\(0\.8, 0\.9\)"),
        ("adan", {"betas": [0.8, 0.9]}, r"adan does not take .*betas=\(0\.8, 0\.9\); .*betas=\(0\.98, 0\.92, 0\.99\)"),
        ("lion", {"eps": 1e-6}, r"lion does not take optim\.optim_kwargs\.eps=1e-06"),
        ("sgd", {"amsgrad": True}, r"sgd does not take optim\.optim_kwargs\.amsgrad=True"),
        ("adamw", {"momentum": 0.9}, r"adamw does not take optim\.optim_kwargs\.momentum=0\.9"),
        ("adamw", {"extra": {"dampening": 0.1}}, r"adamw does not take optim\.optim_kwargs\.extra\.dampening=0\.1"),
        ("adamw", {"extra": {"eps": 1e-6}}, r"extra\.eps: the entry for it is optim\.optim_kwargs\.eps"),
        ("adamw", {"extra": {"lr": 1.0}}, r"extra\.lr: the entry for it is optim\.lr"),
        ("adamw", {"betas": [1.5, 0.9]}, "optimiser adamw: Invalid beta parameter"),
        ("adahessian", {}, r"adahessian needs second derivatives: set loss\.create_graph=true"),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused(name, entries, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(make_config(name, **entries), Network())


def test_an_optimizer_of_a_missing_package_is_refused():
    with pytest.raises(ValueError, match="optimiser bnblion8bit is not available here"):
        build_optimizer(make_config("bnblion8bit"), Network())


@pytest.mark.parametrize(("name", "is_fused"), [("adamw", True), ("lamb", False), ("sgd", False), ("adagrad", False)])
def test_an_optimizer_is_fused_on_gpus(name, is_fused):
    whole, part = Network(), Network()
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole.to("cuda")
        part.head.to("cuda")
        fused = [bool(build_optimizer(make_config(name), network).defaults.get("fused")) for network in (whole, part)]
    assert fused == [is_fused, False]


def test_second_derivatives_of_a_scan_are_refused():
    config = make_config("adahessian")
    config.loss.create_graph = True
    with pytest.raises(ValueError, match=r"create_graph=true asks for second derivatives.*create_graph=false.*=adamw"):
        build_optimizer(config, nn.Sequential(SS2D(16)))
