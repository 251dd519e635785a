"""Decoders of segmentation-models-pytorch train on a variant, through timm's features at strides 2 to 32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN

import model  # noqa: F401  (registers the variants with timm)

smp = pytest.importorskip("segmentation_models_pytorch")


@pytest.mark.parametrize("decoder", ["Unet", "FPN"])
def test_a_decoder_learns(decoder):
    torch.manual_seed(0)
    network = getattr(smp, decoder)("tu-mobilemamba_t2", encoder_weights=None, classes=2)
    assert network.encoder.out_channels == [3, 18, 36, 72, 144, 272]
    squares = torch.zeros(4, 64, 64, dtype=torch.long)
    for square, corner in zip(squares, (8, 16, 24, 32), strict=True):
        square[corner : corner + 20, 40 - corner : 60 - corner] = 1
    images = squares.unsqueeze(1) + 0.1 * torch.randn(4, 3, 64, 64) + torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(network(images), squares)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [name for name, value in network.named_parameters() if value.requires_grad and value.grad is None] == []
    assert losses[-1] < 0.6 * losses[0]
    network.eval()
    with torch.no_grad():
        expected = network(images)
        network.encoder.model.model.fuse()
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-3)
