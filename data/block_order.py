"""An epoch's order for data sets too large to be permuted whole: blocks are shuffled, then the images of a few of them.

A permutation of 10^9 images takes 8 GB and minutes on every process. Here an epoch permutes only the blocks. Each
``WINDOW`` of them in a row make a window, whose images are permuted when the first of them is asked for. An epoch goes
from window to window, so that few shards are in use at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["MAX_SEED", "WINDOW", "BlockOrder", "split_blocks"]

MAX_SEED = 2**63 - 1
WINDOW = 16  # blocks
LARGEST_BLOCK = 65_536  # images; a window of such blocks takes 16 MB, its positions and seeds together


def split_blocks(sizes: Sequence[int]) -> np.ndarray:
    """Return the sizes of blocks (int64), the largest cut into pieces, the empty ones left out."""
    whole = np.asarray(sizes, dtype=np.int64)
    whole = whole[whole > 0]
    num_pieces = -(-whole // LARGEST_BLOCK)
    pieces = np.full(num_pieces.sum(), LARGEST_BLOCK, dtype=np.int64)
    pieces[num_pieces.cumsum() - 1] = whole - (num_pieces - 1) * LARGEST_BLOCK
    return pieces


class BlockOrder:
    """The image and the augmentation seed at each position of one epoch.

    They depend on the arguments alone, not on which positions were asked for before. Positions from ``length`` on start
    over, with other seeds.

    Args:
        block_sizes: Images per block (int64), in the order of the images' indices.
        seed: The run's.
        epoch: From 0.
        num_repeats: Positions in a row that show one image.
        length: Positions of an epoch.
    """

    def __init__(self, block_sizes: np.ndarray, *, seed: int, epoch: int, num_repeats: int, length: int) -> None:
        self.num_repeats = num_repeats
        self.length = length
        self._key = (seed, epoch)
        blocks = torch.randperm(len(block_sizes), generator=self._generator()).numpy()
        self._sizes = block_sizes[blocks]
        self._first_images = (block_sizes.cumsum() - block_sizes)[blocks]
        last_blocks = [*range(WINDOW - 1, len(blocks) - 1, WINDOW), len(blocks) - 1]
        self._window_starts = np.concatenate([[0], self._sizes.cumsum()[last_blocks]])
        self._drawn: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return image indices and seeds (both int64) at ascending positions (N,)."""
        laps, places = np.divmod(positions, self.length)
        windows = np.searchsorted(self._window_starts, places // self.num_repeats, side="right") - 1
        images, seeds = np.empty_like(positions), np.empty_like(positions)
        for lap, window in dict.fromkeys(zip(laps.tolist(), windows.tolist(), strict=True)):
            is_here = (laps == lap) & (windows == window)
            inside = places[is_here] - self._window_starts[window] * self.num_repeats
            window_images, window_seeds = self._draw(lap, window)
            images[is_here] = window_images[inside // self.num_repeats]
            seeds[is_here] = window_seeds[inside]
        return images, seeds

    def _draw(self, lap: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a window's images in their order, and the seeds of its positions; those drawn last are kept."""
        if self._drawn is None or self._drawn[0] != (lap, window):
            blocks = slice(window * WINDOW, (window + 1) * WINDOW)
            sizes = self._sizes[blocks]
            within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
            images = np.repeat(self._first_images[blocks], sizes) + within
            order = torch.randperm(len(images), generator=self._generator(window)).numpy()
            num_seeds = len(images) * self.num_repeats
            seeds = torch.randint(MAX_SEED, (num_seeds,), generator=self._generator(window, lap)).numpy()
            self._drawn = ((lap, window), images[order], seeds)
        return self._drawn[1:]

    def _generator(self, *key: int) -> torch.Generator:
        """Return a generator for one purpose, named by a window, and the lap for its seeds; blocks have no name."""
        state = np.random.SeedSequence((*self._key, len(key), *key)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))
