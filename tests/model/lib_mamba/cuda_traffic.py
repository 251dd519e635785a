"""What the CUDA kernels for the released networks' scans move from and to global memory, for 16-bit sequences.

`python tests/model/lib_mamba/cuda_traffic.py` prints the table of csrc/scan/README.md; test_model_cuda_on_cpu.py counts
the same as the kernels run. Parameters, and the sums for their gradients, are left out: every block reads and writes
the same few, which stay in the caches.
"""

from __future__ import annotations

from math import ceil

ELEMENT, FLOAT = 2, 4  # bytes
LANES = 32
GROUP = 64  # channels of a warp
BLOCK_CHUNKS = 4
LONGEST_CHUNK = 16
CHUNKS = (16, 14, 13, 12, 9)
FLOOR = 5  # values of a channel and position: x, z and the output's gradient, read; the gradients of x and z, written

# Every scan of the released networks: channels and length.
SCANS = [
    *((224, 144), (288, 144), (320, 196), (320, 256), (320, 576), (320, 1024), (384, 36), (448, 9)),
    *((512, 36), (512, 64), (512, 144), (512, 256), (544, 9), (544, 16), (544, 36), (544, 49), (544, 64)),
]


def num_chunks(length):
    """Return how many chunks a sequence has, of the length that pads it least; of two such lengths, the longer."""
    return min((ceil(length / chunk) * chunk, ceil(length / chunk)) for chunk in CHUNKS)[1]


def states_bytes(channels, length):
    """Return the bytes of an image's states that the forward pass keeps for the gradients."""
    return 2 * num_chunks(length) * channels * FLOAT if length > LONGEST_CHUNK else 0


def statistics_bytes(length):
    """Return the bytes of an image's means and deviations, kept as well."""
    return 2 * length * FLOAT


def kept_bytes(channels, length):
    """Return the bytes of all that the forward pass keeps of an image."""
    return states_bytes(channels, length) + statistics_bytes(length)


def backward_bytes(channels, length):
    """Return the bytes of an image that its gradients load, and store."""
    values = channels * length * ELEMENT
    projection = 2 * (ceil(channels / 32) + 2) * length * ELEMENT
    blocks = ceil(num_chunks(length) / BLOCK_CHUNKS) if length > LONGEST_CHUNK else 1
    # Of every block and direction: how the gradients of its states pass through, for those behind it to read.
    warps = ceil(channels / GROUP)
    passages = 2 * blocks * warps * LANES * 4 * FLOAT if blocks > 1 else 0
    kept = 2 * states_bytes(channels, length) + warps * statistics_bytes(length)
    loaded = 4 * values + projection + kept + passages * (blocks - 1) // 2
    stored = 2 * values + projection + passages
    return loaded, stored


def main():
    """Print the bytes of every scan as shares of the floor."""
    print("| D | L | kept | gradients |")
    print("|---|---|---|---|")
    for channels, length in SCANS:
        floor = FLOOR * channels * length * ELEMENT
        kept, moved = kept_bytes(channels, length), sum(backward_bytes(channels, length))
        print(f"| {channels} | {length} | {kept / floor:.2f} | {moved / floor:.2f} |")


if __name__ == "__main__":
    main()
