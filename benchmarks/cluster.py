"""What processes exchange in a training step, and the time of a step on 1 to 64 nodes: computed, not measured.

    python -m benchmarks.cluster --variant MobileMamba_B4 [--step-seconds SECONDS --batch IMAGES]

The bytes are those of the network's gradients and buffers, in the buckets of DistributedDataParallel. The time of a
collective follows NCCL's own cost model (src/graph/tuning.cc of NVIDIA/nccl): the fastest of a ring and a tree, each
with its latency per hop and its share of the link's rate. The time of a step on one GPU is an input;
benchmarks.train_step measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed, nn

from model import create_model, list_models

from .common import table
from .parsers import new_parser

__all__ = [
    "Bounds",
    "Cluster",
    "Exchange",
    "buckets_of",
    "compute_for",
    "exchange_of",
    "main",
    "ring_bytes",
    "step_time",
]

MIB = 2**20
BUCKET_LIMITS = [MIB, 25 * MIB]  # of DistributedDataParallel: the first bucket that is sent, and the others
NUM_FINDINGS = 7  # float64 numbers that the processes agree on in each step: losses, gradients, files, signals
BACKWARD = 2 / 3  # share of a step that gradients can be sent in

# Rates of a link in one direction, in bytes/s. NVLink: NVIDIA's data sheet of the H100, 900 GB/s in both directions.
# InfiniBand: the DGX H100's user guide, eight ports of 400 Gb/s, one for each GPU.
NVLINK = 450e9
INFINIBAND = 50e9


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A way of NCCL's to add up numbers.

    Attributes:
        is_tree: Whether processes form a tree rather than a ring.
        start: Seconds before the first hop.
        inside: Seconds a hop within a node.
        between: Seconds a hop between nodes.
        share: Of the link's rate that data get.
    """

    is_tree: bool
    start: float
    inside: float
    between: float
    share: float


ALGORITHMS = (
    Algorithm(is_tree=False, start=8.4e-6, inside=3.4e-6, between=9.6e-6, share=1.0),
    Algorithm(is_tree=False, start=3.6e-6, inside=1.8 * 0.47e-6, between=2.7e-6, share=1 / 4),
    Algorithm(is_tree=True, start=0.0, inside=28e-6, between=50e-6, share=0.9),
    Algorithm(is_tree=True, start=4.4e-6, inside=1.8 * 0.52e-6, between=5.0e-6, share=0.9 / 3.8),
)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes with GPUs.

    Attributes:
        nodes: Number of nodes.
        gpus: GPUs of a node.
        inside: Rate of a GPU's link within a node, bytes/s in one direction.
        between: Rate of a GPU's share of the network, bytes/s in one direction.
    """

    nodes: int = 1
    gpus: int = 8
    inside: float = NVLINK
    between: float = INFINIBAND

    @property
    def size(self) -> int:
        """Number of GPUs."""
        return self.nodes * self.gpus

    @property
    def rate(self) -> float:
        """Rate of the slowest link on the way, bytes/s."""
        return self.inside if self.nodes == 1 else min(self.inside, self.between)

    def all_reduce(self, num_bytes: float) -> float:
        """Return the seconds in which NCCL adds up so many bytes over all GPUs, by the best of its ways."""
        return min(self._all_reduce(num_bytes, algorithm) for algorithm in ALGORITHMS) if self.size > 1 else 0.0

    def _all_reduce(self, num_bytes: float, algorithm: Algorithm) -> float:
        if algorithm.is_tree:
            inside, between = 2 * (self.gpus - 1), 2 * (self.nodes - 1).bit_length()
            sent = 2.0 * num_bytes
        else:
            between = 2 * (self.nodes - 1)
            inside = 2 * (self.size - 1) - between
            sent = ring_bytes(num_bytes, self.size)
        latency = algorithm.start + inside * algorithm.inside + between * algorithm.between
        return latency + sent / (algorithm.share * self.rate)

    def broadcast(self, num_bytes: float) -> float:
        """Return the seconds in which so many bytes of one GPU go round the ring."""
        if self.size == 1:
            return 0.0
        ring = ALGORITHMS[0]
        between = self.nodes - 1
        latency = ring.start + (self.size - 1 - between) * ring.inside + between * ring.between
        return latency + num_bytes / self.rate


def ring_bytes(num_bytes: float, size: int) -> float:
    """Return the bytes that each of ``size`` processes sends to add up ``num_bytes`` over a ring."""
    return 2 * (size - 1) / size * num_bytes


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What processes exchange in a step, in bytes.

    Attributes:
        buckets: Gradients, by bucket, in the order in which a backward pass fills them.
        buffers: Statistics of batch norms that rank 0 sends before a step, by number format.
    """

    buckets: tuple[int, ...]
    buffers: tuple[int, ...]


def buckets_of(network: nn.Module) -> tuple[int, ...]:
    """Return the bytes of the buckets that DistributedDataParallel makes of a network's gradients."""
    # They are built in the order in which gradients come, nearly that of the parameters from the last one on.
    gradients = [parameter for parameter in network.parameters() if parameter.requires_grad][::-1]
    indices, _ = distributed._compute_bucket_assignment_by_size(gradients, BUCKET_LIMITS)
    return tuple(sum(gradients[index].nbytes for index in bucket) for bucket in indices)


def exchange_of(network: nn.Module) -> Exchange:
    """Return what the processes that train a network exchange in a step."""
    by_format: dict[torch.dtype, int] = {}
    for buffer in network.buffers():
        by_format[buffer.dtype] = by_format.get(buffer.dtype, 0) + buffer.nbytes
    return Exchange(buckets=buckets_of(network), buffers=tuple(by_format.values()))


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A time in seconds: at best, and at worst.

    Attributes:
        hidden: Gradients are sent behind the backward pass, but for those that come last.
        exposed: Nothing is sent while anything is computed.
    """

    hidden: float
    exposed: float


def step_time(exchange: Exchange, cluster: Cluster, *, compute: float) -> Bounds:
    """Return the time of a step.

    Args:
        exchange: What is sent.
        cluster: By whom.
        compute: Seconds of a step on one GPU that exchanges nothing.
    """
    gradients, others = _sending_time(exchange, cluster)
    late = max(gradients[-1], sum(gradients) - BACKWARD * compute)
    return Bounds(hidden=compute + others + late, exposed=compute + others + sum(gradients))


def compute_for(share: float, exchange: Exchange, cluster: Cluster) -> Bounds:
    """Return how long a step must compute on one GPU for computing to be ``share`` of the step's time."""
    gradients, others = _sending_time(exchange, cluster)
    rest = 1 / share - 1
    hidden = max((others + gradients[-1]) / rest, (others + sum(gradients)) / (rest + BACKWARD))
    return Bounds(hidden=hidden, exposed=(others + sum(gradients)) / rest)


def _sending_time(exchange: Exchange, cluster: Cluster) -> tuple[list[float], float]:
    """Return the seconds of each bucket, and of everything else."""
    gradients = [cluster.all_reduce(num_bytes) for num_bytes in exchange.buckets]
    return gradients, sum(map(cluster.broadcast, exchange.buffers)) + cluster.all_reduce(8 * NUM_FINDINGS)


HEADER = ("nodes", "GPUs", "MB sent by a GPU", "all exchange, ms", "90% from a step of, ms")
PACE_HEADER = ("images/s", "% of as many single GPUs")


def rows(exchange: Exchange, *, between: float, nodes: Sequence[int]) -> list[list[str]]:
    """Return the lines of the table, one for each number of nodes."""
    lines = []
    for number in nodes:
        cluster = Cluster(nodes=number, between=between)
        sent = ring_bytes(sum(exchange.buckets), cluster.size) / 1e6
        exchanging = 1e3 * step_time(exchange, cluster, compute=0.0).exposed
        least = compute_for(0.9, exchange, cluster)
        needed = f"{1e3 * least.hidden:.0f} to {1e3 * least.exposed:.0f}"
        lines.append([str(number), str(cluster.size), f"{sent:.1f}", f"{exchanging:.1f}", needed])
    return lines


def pace(exchange: Exchange, cluster: Cluster, *, compute: float, batch: int) -> list[str]:
    """Return further cells of a line: images/s, and their share of what as many single GPUs do."""
    time = step_time(exchange, cluster, compute=compute)
    images = [batch * cluster.size / seconds for seconds in (time.exposed, time.hidden)]
    shares = [100 * compute / seconds for seconds in (time.exposed, time.hidden)]
    return [f"{images[0]:,.0f} to {images[1]:,.0f}", f"{shares[0]:.1f} to {shares[1]:.1f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = new_parser("cluster", __doc__)
    parser.add_argument("--variant", default="MobileMamba_T2", choices=list_models())
    parser.add_argument("--step-seconds", type=float, help="of a step on one GPU, measured")
    parser.add_argument("--batch", type=int, default=128, help="images of that step")
    parser.add_argument("--between", type=float, default=INFINIBAND, help="bytes/s between nodes, for each GPU")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    given = parser.parse_args(arguments)
    seconds = given.step_seconds
    if min(given.batch, given.between, *given.nodes, 1 if seconds is None else seconds) <= 0:
        parser.error("--step-seconds, --batch, --between and --nodes must be above 0")
    exchange = exchange_of(create_model(given.variant))
    sizes = ", ".join(f"{size / 1e6:.1f}" for size in exchange.buckets)
    print(f"{given.variant}: gradients {sizes} MB by bucket, buffers {sum(exchange.buffers) / 1e6:.2f} MB; computed")
    lines, header = rows(exchange, between=given.between, nodes=given.nodes), HEADER
    if seconds is not None:
        header += PACE_HEADER
        for line in lines:
            cluster = Cluster(nodes=int(line[0]), between=given.between)
            line += pace(exchange, cluster, compute=seconds, batch=given.batch)
    print(table(lines, header))


if __name__ == "__main__":
    main()
