"""On a GPU: the scan at the shapes that are run, networks in AMP, compiled and as CUDA graphs (pytest -m gpu).

Every test has a case on the CPU with few images, so that its own code is known to work before a GPU is at hand.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scan_cases import NAMES, TOLERANCES, arguments, exact_statistics, gated_scan_loop, statistics_error

from benchmarks.common import capture
from benchmarks.gpu.checks import production_calls
from model import create_model, list_models
from model.lib_mamba import backends, gated_scan, use_backend

# (D, L, R) of the six variants' scans at their own sizes.
CALLS = [
    *((224, 144, 7), (384, 36, 12), (448, 9, 14), (288, 144, 9), (512, 36, 16), (544, 9, 17), (320, 196, 10)),
    *((544, 49, 17), (544, 16, 17), (320, 256, 10), (512, 64, 16), (320, 576, 10), (512, 144, 16), (544, 36, 17)),
    *((320, 1024, 10), (512, 256, 16), (544, 64, 17)),
]
ON_CPU = [(448, 9, 14), (224, 144, 7)]
NUM_SEQUENCES = 3
pytestmark = pytest.mark.usefixtures("one_thread")
T2, B1 = "MobileMamba_T2", "MobileMamba_B1"


def on_gpu(*values):
    return pytest.param(*values, marks=pytest.mark.gpu)


@pytest.fixture
def device(request):
    """The device that a case names; a GPU that is not there is a reason to skip."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    return request.param


DEVICES = pytest.mark.parametrize("device", ["cpu", on_gpu("cuda")], indirect=True)


def test_the_calls_are_those_of_the_variants():
    assert sorted((call.channels, call.length, call.rank) for call in production_calls(list_models())) == sorted(CALLS)


def production_cases():
    yield from (("reference", "cpu", shape, 3) for shape in ON_CPU)
    for shape in CALLS:
        yield from (on_gpu("cuda", "cuda", shape, batch) for batch in (256, 128, 1))
        yield on_gpu("triton", "cuda", shape, 256)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(("name", "device", "shape", "batch"), list(production_cases()), indirect=["device"])
def test_production_shapes_against_float64(name, device, shape, batch, dtype, require_backend, poisoned_memory):
    """Output and gradients of the first and the last image, against the definition; all others get no gradient."""
    require_backend(name)
    channels, length, rank = shape
    tensors = arguments(length, batch=batch, channels=channels, rank=rank, dtype=dtype, device=device)
    tensors[3] = tensors[3] / rank**0.5
    ends = sorted({0, batch - 1})
    weights = torch.zeros(batch, length, channels, dtype=dtype, device=device)
    weights[ends] = torch.randn(len(ends), length, channels, device=device).to(dtype)
    with use_backend(name):
        first, again = (differentiate(gated_scan, tensors, weights) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    exact_inputs = [tensor[ends] for tensor in tensors[:NUM_SEQUENCES]] + tensors[NUM_SEQUENCES:]
    expected = differentiate(gated_scan_loop, [tensor.double() for tensor in exact_inputs], weights[ends].double())
    y, *gradients = first
    errors = {"y": error(y[ends], expected[0])}
    for index, (parameter, own, exact) in enumerate(zip(NAMES, gradients, expected[1:], strict=True)):
        is_sequence = index < NUM_SEQUENCES
        errors[parameter] = error(own[ends] if is_sequence else own, exact)
        if is_sequence:
            assert own[1:-1].count_nonzero() == 0, parameter
    tolerance, gradient_tolerance = (2 * limit for limit in TOLERANCES[dtype])  # a GPU's own exponentials
    limits = dict.fromkeys(NAMES, gradient_tolerance) | {"y": tolerance}
    assert {key: value for key, value in errors.items() if not value <= limits[key]} == {}


def differentiate(function, tensors, weights):
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, weights)]


def error(actual, exact):
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(
    ("device", "shape"), [("cpu", ON_CPU[0]), *(on_gpu("cuda", shape) for shape in CALLS)], indirect=["device"]
)
def test_what_the_forward_pass_keeps_changes_no_gradient(device, shape, dtype):
    channels, length, rank = shape
    tensors = arguments(length, batch=3, channels=channels, rank=rank, dtype=dtype, device=device)
    tensors[3] = tensors[3] / rank**0.5
    y, *kept = torch.ops.mobilemamba.gated_scan_with_states(*tensors, 1e-5, [0, 1])
    given, found = (torch.ops.mobilemamba.gated_scan_backward(y, *tensors, 1e-5, [0, 1], *own) for own in (kept, ()))
    assert all(torch.equal(one, other) for one, other in zip(given, found, strict=True))
    if backends.choose(device).name == "cuda":
        assert statistics_error(kept[1], exact_statistics(tensors)) < (1e-5 if dtype == torch.float32 else 2e-3)


def network_and_images(device, *, name=T2, batch=4, is_folded=False):
    torch.manual_seed(0)
    network = create_model(name, num_classes=8, drop_path=0.0)
    network = network.eval().to(device).fuse() if is_folded else network.to(device).train()
    size = network.img_size if device == "cuda" else 64
    return network, torch.randn(batch, 3, size, size, device=device)


def step(network, images, dtype, *, call=None):
    """Return the loss and the gradients of one step in autocast."""
    targets = torch.arange(len(images), device=images.device) % 8
    scale = 1024.0 if dtype == torch.float16 else 1.0
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy((call or network)(images), targets)
    (scale * loss).backward()
    gradients = torch.cat(
        [parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None]
    )
    network.zero_grad()
    return loss.detach(), gradients / scale


@pytest.mark.parametrize(
    ("device", "dtype", "is_compiled"),
    [
        ("cpu", torch.float32, False),
        ("cpu", torch.bfloat16, False),
        *(on_gpu("cuda", dtype, False) for dtype in TOLERANCES),
        *(on_gpu("cuda", dtype, True) for dtype in TOLERANCES),
    ],
    indirect=["device"],
)
def test_a_training_step_agrees_with_the_reference_scan(device, dtype, is_compiled):
    """In AMP, eager and compiled: everything else of the network is the same, so that only the scan can differ."""
    network, images = network_and_images(device, batch=32 if device == "cuda" else 4)
    with use_backend(backends.REFERENCE):
        expected_loss, expected = step(network, images, dtype)
    call = torch.compile(network, fullgraph=True) if is_compiled else network
    loss, gradients = step(network, images, dtype, call=call)
    assert loss.isfinite()
    torch.testing.assert_close(loss, expected_loss, rtol=3e-2, atol=0)
    assert F.cosine_similarity(gradients, expected, dim=0) > (0.99 if dtype == torch.float32 else 0.95)


@DEVICES
@pytest.mark.parametrize("name", [T2, pytest.param(B1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["compile", "graph", "compile and graph"])
def test_a_folded_network_compiled_and_as_a_graph(mode, name, device):
    """It gives what it gives in eager mode, also for images that come after the capture."""
    network, images = network_and_images(device, name=name, is_folded=True)
    on_gpu = device == "cuda"
    backend = "inductor" if on_gpu else "aot_eager"
    call = torch.compile(network, fullgraph=True, backend=backend) if "compile" in mode else network

    def run():
        with torch.inference_mode():
            return call(images)

    run()
    replay = capture(run) if on_gpu and "graph" in mode else run
    replay()
    images.copy_(torch.randn_like(images))
    actual = replay().clone()
    with torch.inference_mode():
        expected = network(images)
    assert error(actual, expected.double()) < 1e-4


@DEVICES
def test_the_backward_pass_as_a_graph(device):
    """Forward and backward of the scan captured together give new gradients for new inputs."""
    tensors = arguments(36, channels=96, device=device)
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    weights = torch.ones_like(tensors[0])

    def run():
        return torch.autograd.grad(gated_scan(*inputs), inputs, weights)

    replay = capture(run) if device == "cuda" else run
    replay()
    with torch.no_grad():
        inputs[0].copy_(torch.randn_like(inputs[0]))
    actual = [gradient.clone() for gradient in replay()]
    for own, other in zip(actual, run(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


@pytest.mark.gpu
def test_the_cuda_kernels_are_chosen_on_a_gpu():
    """Whoever has built them is not to run on anything slower."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    is_available, reason = backends.availability("cuda")
    if not is_available:
        pytest.skip(reason)
    choice = backends.choose("cuda")
    assert choice.name == "cuda", choice.reason
