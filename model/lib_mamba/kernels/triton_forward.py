"""Triton kernels: the scan of both directions, and the normalisation and gate after it.

B batch, L length, D channels, R rank of the time step; two directions (0 from the first position to the last, 1 from
the last to the first) and one state component. A program holds a tile of BLOCK_L positions and BLOCK_D channels.

Notable:
  - delta is rebuilt from its low-rank form tile by tile; a direction that runs backwards indexes from the end.
  - Within a tile the recurrence is an associative scan, from tile to tile a carried state.
  - The sum of the directions is float32 in memory: before it is normalised it may exceed the range of float16.
"""

import triton
import triton.language as tl

__all__ = ["drive_tile", "load_parameters", "load_projection", "norm_gate_kernel", "scan_kernel"]


@triton.jit
def log1p_exp(value):
    """Return log(1 + exp(value)), relatively accurate where exp(value) is far below 1 too."""
    small = tl.exp(-tl.abs(value))
    series = small * (1.0 - small * (0.5 - small * (0.33333333 - small * (0.25 - small * 0.2))))
    return tl.maximum(value, 0.0) + tl.where(small < 0.0625, series, tl.log(1.0 + small))


@triton.jit
def compose(decay_first, state_first, decay_second, state_second):
    """Return the map state -> decay * state + state_added that two such maps make one after the other."""
    return decay_first * decay_second, decay_second * state_first + state_second


@triton.jit
def load_parameters(
    dt_weight,
    dt_bias,
    A_log,
    direction,
    d,
    D,
    R,
    BLOCK_R: tl.constexpr,
):
    """Return dt_weight (BLOCK_R, BLOCK_D), dt_bias and A (BLOCK_D) of a direction, zero outside."""
    r = tl.arange(0, BLOCK_R)
    own = direction * D + d
    is_weight = (r < R)[:, None] & (d < D)[None, :]
    weight = tl.load(dt_weight + own[None, :] * R + r[:, None], mask=is_weight, other=0.0)
    bias = tl.load(dt_bias + own, mask=d < D, other=0.0)
    A = -tl.exp(tl.load(A_log + own, mask=d < D, other=0.0))
    return weight, bias, A


@triton.jit
def load_projection(projection, t, is_inside, R, BLOCK_R: tl.constexpr):
    """Return dt (BLOCK_L, BLOCK_R), B and C (BLOCK_L) at positions t of an image and direction, zero outside."""
    r = tl.arange(0, BLOCK_R)
    start = projection + t * (2 * (R + 2))
    dt = tl.load(start[:, None] + r[None, :], mask=is_inside[:, None] & (r < R)[None, :], other=0.0)
    B = tl.load(start + R, mask=is_inside, other=0.0)
    C = tl.load(start + R + 1, mask=is_inside, other=0.0)
    return dt.to(tl.float32), B.to(tl.float32), C.to(tl.float32)


@triton.jit
def drive_tile(x, dt, B, weight, bias, A, PRECISION: tl.constexpr):
    """Return raw (before the softplus), delta, decay and drive = delta * B * x, each (BLOCK_L, BLOCK_D)."""
    raw = tl.dot(dt, weight, input_precision=PRECISION) + bias[None, :]
    delta = log1p_exp(raw)
    decay = tl.exp(delta * A[None, :])
    drive = delta * B[:, None] * x
    return raw, delta, decay, drive


@triton.jit
def scan_kernel(
    x,
    projection,
    dt_weight,
    dt_bias,
    A_log,
    D_skip,
    y,
    checkpoints,
    L,
    D,
    R,
    x_row,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_TILES: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the sum of both directions to y (B, L, D; fp32); grid (blocks of D, B).

    With SAVE, the states that enter each tile go to checkpoints (B, 2, tiles, D). NUM_TILES is 0 where it is left to
    run time.
    """
    batch = tl.program_id(1).to(tl.int64)
    num_tiles = tl.cdiv(L, BLOCK_L)
    # Offsets within one image fit 32 bits; those of the image itself may not.
    x += batch * L * x_row
    y += batch * L * D
    projection += batch * L * (2 * (R + 2))
    checkpoints += batch * 2 * num_tiles * D
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    skip = tl.load(D_skip + d, mask=d < D, other=0.0) + tl.load(D_skip + D + d, mask=d < D, other=0.0)
    for direction in tl.static_range(1, -1, -1):
        weight, bias, A = load_parameters(dt_weight, dt_bias, A_log, direction, d, D, R, BLOCK_R)
        state = tl.zeros((BLOCK_D,), tl.float32)
        for index in range(NUM_TILES if NUM_TILES else num_tiles):
            tile = num_tiles - 1 - index if direction == 1 else index
            if SAVE:
                tl.store(checkpoints + (direction * num_tiles + tile) * D + d, state, mask=d < D)
            local = tl.arange(0, BLOCK_L)
            t = tile * BLOCK_L + local
            is_inside = (t < L)[:, None] & (d < D)[None, :]
            x_tile = tl.load(x + t[:, None] * x_row + d[None, :], mask=is_inside, other=0.0).to(tl.float32)
            dt, B, C = load_projection(projection + direction * (R + 2), t, t < L, R, BLOCK_R)
            _, _, decay, drive = drive_tile(x_tile, dt, B, weight, bias, A, PRECISION)
            decays, states = tl.associative_scan((decay, drive), 0, compose, reverse=direction == 1)
            states += decays * state[None, :]
            is_last = local == (0 if direction == 1 else BLOCK_L - 1)
            state = tl.sum(tl.where(is_last[:, None], states, 0.0), axis=0)
            total = states * C[:, None]
            y_tile = y + t[:, None] * D + d[None, :]
            if direction == 0:
                total += tl.load(y_tile, mask=is_inside, other=0.0) + skip[None, :] * x_tile
            tl.store(y_tile, total, mask=is_inside)
        # Another thread may load what this one has stored.
        tl.debug_barrier()


@triton.jit
def normalize(y, is_channel, D, eps):
    """Return y (rows, channels) less its mean over the channels, over its deviation, and 1 / deviation (rows)."""
    mean = tl.sum(y, axis=1) / D
    centred = tl.where(is_channel[None, :], y - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def norm_gate_kernel(
    total,
    z,
    norm_weight,
    norm_bias,
    y,
    num_rows,
    D,
    z_row,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Normalise total (rows, D) over the channels, gate it with z and write y (rows, D); grid (blocks of rows,)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    is_inside = (row < num_rows)[:, None] & (d < D)[None, :]
    tile = row[:, None] * D + d[None, :]
    normed, _ = normalize(tl.load(total + tile, mask=is_inside, other=0.0), d < D, D, eps)
    weight = tl.load(norm_weight + d, mask=d < D, other=0.0)
    bias = tl.load(norm_bias + d, mask=d < D, other=0.0)
    gate = tl.load(z + row[:, None] * z_row + d[None, :], mask=is_inside, other=0.0).to(tl.float32)
    gated = (normed * weight[None, :] + bias[None, :]) * gate * tl.sigmoid(gate)
    tl.store(y + tile, gated.to(y.dtype.element_ty), mask=is_inside)
