"""A process of a group that takes one step with DistributedDataParallel; the tests look at what it leaves in a file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import create_model

IMAGES_PER_PROCESS = 2


def network_and_images(world_size: int):
    """Weights and images that are the same in every process; batch norms do not measure the batch."""
    torch.manual_seed(0)
    network = create_model("MobileMamba_T2", num_classes=4, drop_path=0.0).eval()
    return network, torch.randn(world_size * IMAGES_PER_PROCESS, 3, 64, 64)


def loss_of(network, images):
    return network(images).square().mean()


def main(device_type: str, rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world_size,
        device_id=device if device_type == "cuda" else None,
    )
    network, images = network_and_images(world_size)
    own = images[rank * IMAGES_PER_PROCESS : (rank + 1) * IMAGES_PER_PROCESS].to(device)
    parallel = DistributedDataParallel(network.to(device), device_ids=[rank] if device_type == "cuda" else None)
    loss_of(parallel, own).backward()
    total = torch.full((3,), float(rank + 1), device=device)
    dist.all_reduce(total)
    gradients = {name: own.grad.cpu() for name, own in network.named_parameters() if own.grad is not None}
    torch.save({"total": total.cpu(), "gradients": gradients}, folder / f"rank{rank}.pth")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
