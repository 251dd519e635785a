"""The average of the weights against a float64 loop, on networks of any layout."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from trainer.average import WeightAverage, unwrap_network


class Tied(nn.Module):
    """A network with BatchNorm, a tied weight, a buffer of integers and one left out of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("filters", torch.full((2,), 0.5))
        self.register_buffer("unsaved", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.bn(self.conv(x)).mean((2, 3))))


def train_step(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    network.train()(3 * torch.randn(4, 3, 6, 6, generator=generator) + 1).square().mean().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None


def test_average_equals_a_float64_loop() -> None:
    torch.manual_seed(0)
    network, decay = Tied(), 0.9
    average = WeightAverage(network, decay=decay)
    expected = {name: value.double() for name, value in network.state_dict().items()}
    for seed in range(7):
        train_step(network, seed)
        average.update(network)
        for name, value in network.state_dict().items():
            is_float = value.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * value.double() if is_float else value.double()
    averaged = average.module.state_dict()
    assert list(averaged) == list(network.state_dict())
    for name, value in averaged.items():
        assert value.dtype == network.state_dict()[name].dtype
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
    assert averaged["bn.num_batches_tracked"] == 7
    assert not torch.equal(averaged["bn.running_mean"], network.bn.running_mean)
    assert averaged["first.weight"] is not network.first.weight
    assert average.module.first.weight is average.module.second.weight


def test_network_is_left_alone() -> None:
    network = Tied()
    average = WeightAverage(network.train(), decay=0.5)
    train_step(network, 0)
    before = copy.deepcopy(network.state_dict())
    average.update(network)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not average.module.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_constant_tensors_stay_exact() -> None:
    network = Tied()
    average = WeightAverage(network, decay=0.9998)
    for _ in range(50):
        average.update(network)
    for name, value in network.state_dict().items():
        assert torch.equal(average.module.state_dict()[name], value)


def test_saved_average_resumes_bit_for_bit() -> None:
    torch.manual_seed(0)
    network = Tied()
    straight = WeightAverage(network, decay=0.9)
    train_step(network, 0)
    straight.update(network)
    resumed = WeightAverage(copy.deepcopy(network), decay=0.9)
    resumed.module.load_state_dict(copy.deepcopy(straight.module.state_dict()))
    train_step(network, 1)
    for average in (straight, resumed):
        average.update(network)
    for name, value in straight.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value)


def test_mixed_dtypes() -> None:
    network = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3).double(), nn.Linear(3, 3).bfloat16()])
    average = WeightAverage(network, decay=0.75)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    before = copy.deepcopy(average.module.state_dict())
    average.update(network)
    for name, value in average.module.state_dict().items():
        assert value.dtype == before[name].dtype
        tolerance = 1e-2 if value.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(value.double(), before[name].double() + 0.25, rtol=tolerance, atol=tolerance)


@pytest.fixture
def gloo(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("order", ["ddp", "compile", "compile-ddp", "ddp-compile"])
def test_wrapped_network(order: str) -> None:
    network = wrapped = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for wrapper in order.split("-"):
        is_ddp = wrapper == "ddp"
        wrapped = nn.parallel.DistributedDataParallel(wrapped) if is_ddp else torch.compile(wrapped, backend="eager")
    assert unwrap_network(wrapped) is network
    average = WeightAverage(wrapped, decay=0.5)
    start = network[0].weight.detach().clone()
    nn.init.zeros_(network[0].weight)
    average.update(wrapped)
    assert list(average.module.state_dict()) == list(network.state_dict())
    assert torch.equal(average.module.state_dict()["0.weight"], start / 2)


def test_a_module_of_that_name_is_no_wrapper() -> None:
    network = nn.Module()
    network.module = nn.Linear(2, 2)
    assert unwrap_network(network) is network


def test_another_network_is_refused() -> None:
    average = WeightAverage(nn.Linear(2, 2), decay=0.5)
    with pytest.raises(ValueError, match="its tensors differ"):
        average.update(nn.Linear(2, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_average_on_a_gpu_equals_that_on_the_cpu() -> None:
    torch.manual_seed(0)
    network = Tied()
    averages = {device: WeightAverage(copy.deepcopy(network).to(device), decay=0.9) for device in ("cpu", "cuda")}
    for seed in range(3):
        train_step(network, seed)
        for device, average in averages.items():
            average.update(copy.deepcopy(network).to(device))
    for name, value in averages["cpu"].module.state_dict().items():
        torch.testing.assert_close(averages["cuda"].module.state_dict()[name].cpu(), value, rtol=1e-6, atol=1e-7)
