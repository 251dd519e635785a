"""Triton kernels: gradients of the gate and normalisation, then of the scan.

Shapes and names as in `triton_forward`. All sums over channels or positions go to a buffer per program, which is added
up in a fixed order: no atomics, so that gradients are the same from run to run.
"""

import triton
import triton.language as tl

from .triton_forward import compose, drive_tile, load_parameters, load_projection, normalize

__all__ = ["norm_gate_backward_kernel", "scan_backward_kernel"]


@triton.jit
def norm_gate_backward_kernel(
    grad,
    y,
    z,
    norm_weight,
    norm_bias,
    dz,
    dnorm,
    num_rows,
    D,
    grad_row,
    z_row,
    eps,
    NUM_STEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn y (rows, D; fp32) into its own gradient, in place, and write dz and dnorm (programs, 2, D).

    Grid (programs,): each does NUM_STEPS blocks of BLOCK_ROWS rows.
    """
    d = tl.arange(0, BLOCK_D)
    weight = tl.load(norm_weight + d, mask=d < D, other=0.0)[None, :]
    bias = tl.load(norm_bias + d, mask=d < D, other=0.0)[None, :]
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    program = tl.program_id(0).to(tl.int64)
    for step in range(NUM_STEPS):
        row = (program * NUM_STEPS + step) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        is_inside = (row < num_rows)[:, None] & (d < D)[None, :]
        y_tile = y + row[:, None] * D + d[None, :]
        normed, rstd = normalize(tl.load(y_tile, mask=is_inside, other=0.0), d < D, D, eps)
        gate = tl.load(z + row[:, None] * z_row + d[None, :], mask=is_inside, other=0.0).to(tl.float32)
        dout = tl.load(grad + row[:, None] * grad_row + d[None, :], mask=is_inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        dgate = dout * (normed * weight + bias) * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(dz + row[:, None] * D + d[None, :], dgate.to(dz.dtype.element_ty), mask=is_inside)
        daffine = dout * gate * sigmoid
        dweight += daffine * normed
        dbias += daffine
        dnormed = daffine * weight
        mean = tl.sum(dnormed, axis=1) / D
        slope = tl.sum(dnormed * normed, axis=1) / D
        dy = (dnormed - mean[:, None] - normed * slope[:, None]) * rstd[:, None]
        tl.store(y_tile, dy, mask=is_inside)
    own = dnorm + program * 2 * D + d
    tl.store(own, tl.sum(dweight, axis=0), mask=d < D)
    tl.store(own + D, tl.sum(dbias, axis=0), mask=d < D)


@triton.jit
def compose_before(decay_1, added_1, decay_before_1, before_1, decay_2, added_2, decay_before_2, before_2):
    """Compose two maps as `compose` does, and return with it their composition without the last element."""
    decay, added = compose(decay_1, added_1, decay_2, added_2)
    decay_before, before = compose(decay_1, added_1, decay_before_2, before_2)
    return decay, added, decay_before, before


@triton.jit
def scan_backward_kernel(
    dy,
    x,
    projection,
    dt_weight,
    dt_bias,
    A_log,
    D_skip,
    checkpoints,
    dx,
    dprojection,
    dparameters,
    L,
    D,
    R,
    x_row,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DIRECTION: tl.constexpr,
    NUM_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of `scan_kernel` for one direction, 0 before 1; grid (blocks of D, B).

    dx (B, L, D), to which direction 1 adds; dprojection (blocks of D, B, L, 2 (R + 2)); dparameters (B, 2, D, R + 3),
    which holds dt_weight's R, then dt_bias's, A_log's and D_skip's.
    """
    batch = tl.program_id(1).to(tl.int64)
    num_tiles = tl.cdiv(L, BLOCK_L)
    # Offsets within one image fit 32 bits; those of the image itself may not.
    x += batch * L * x_row
    dy += batch * L * D
    dx += batch * L * D
    projection += batch * L * (2 * (R + 2)) + DIRECTION * (R + 2)
    dprojection += (tl.program_id(0) * tl.num_programs(1) + batch) * L * (2 * (R + 2)) + DIRECTION * (R + 2)
    checkpoints += (batch * 2 + DIRECTION) * num_tiles * D
    dparameters += (batch * 2 + DIRECTION) * D * (R + 3)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    skip = tl.load(D_skip + d, mask=d < D, other=0.0) + tl.load(D_skip + D + d, mask=d < D, other=0.0)
    weight, bias, A = load_parameters(dt_weight, dt_bias, A_log, DIRECTION, d, D, R, BLOCK_R)
    dweight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    dA = tl.zeros((BLOCK_D,), tl.float32)
    dskip = tl.zeros((BLOCK_D,), tl.float32)
    carried = tl.zeros((BLOCK_D,), tl.float32)
    for index in range(NUM_TILES if NUM_TILES else num_tiles):
        tile = num_tiles - 1 - index if DIRECTION == 0 else index
        local = tl.arange(0, BLOCK_L)
        t = tile * BLOCK_L + local
        is_inside = (t < L)[:, None] & (d < D)[None, :]
        x_tile = tl.load(x + t[:, None] * x_row + d[None, :], mask=is_inside, other=0.0).to(tl.float32)
        dy_tile = tl.load(dy + t[:, None] * D + d[None, :], mask=is_inside, other=0.0)
        dt, B, C = load_projection(projection, t, t < L, R, BLOCK_R)
        raw, delta, decay, drive = drive_tile(x_tile, dt, B, weight, bias, A, PRECISION)
        entering = tl.load(checkpoints + tile * D + d, mask=d < D, other=0.0)
        decays, states = tl.associative_scan((decay, drive), 0, compose, reverse=DIRECTION == 1)
        states += decays * entering[None, :]
        # A state's gradient is its output's share plus what the next step, later in travel, hands back.
        share = C[:, None] * dy_tile
        decays, handed, decays_before, handed_before = tl.associative_scan(
            (decay, decay * share, tl.full((BLOCK_L, BLOCK_D), 1.0, tl.float32), tl.zeros_like(decay)),
            0,
            compose_before,
            reverse=DIRECTION == 0,
        )
        dstates = share + handed_before + decays_before * carried[None, :]
        handed += decays * carried[None, :]
        is_first = local == (0 if DIRECTION == 0 else BLOCK_L - 1)
        carried = tl.sum(tl.where(is_first[:, None], handed, 0.0), axis=0)

        dlog_decay = dstates * (states - drive)  # decay * previous state is what the drive did not add
        ddelta = dstates * B[:, None] * x_tile + dlog_decay * A[None, :]
        draw = tl.where(is_inside, ddelta * tl.sigmoid(raw), 0.0)
        dbias += tl.sum(draw, axis=0)
        dA += tl.sum(dlog_decay * delta, axis=0)
        dweight += tl.dot(tl.trans(dt), draw, input_precision=PRECISION)
        ddt = tl.dot(draw, tl.trans(weight), input_precision=PRECISION)
        own = dprojection + t * (2 * (R + 2))
        tl.store(own[:, None] + r[None, :], ddt, mask=(t < L)[:, None] & (r < R)[None, :])
        tl.store(own + R, tl.sum(dstates * delta * x_tile, axis=1), mask=t < L)
        tl.store(own + R + 1, tl.sum(dy_tile * states, axis=1), mask=t < L)
        dx_tile = dx + t[:, None] * D + d[None, :]
        dx_own = dstates * delta * B[:, None]
        if DIRECTION == 0:
            dskip += tl.sum(dy_tile * x_tile, axis=0)
            dx_own += dy_tile * skip[None, :]
        else:
            dx_own += tl.load(dx_tile, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(dx_tile, dx_own.to(dx.dtype.element_ty), mask=is_inside)
    sums = dparameters + d * (R + 3)
    tl.store(sums[None, :] + r[:, None], dweight, mask=(r < R)[:, None] & (d < D)[None, :])
    tl.store(sums + R, dbias, mask=d < D)
    tl.store(sums + R + 1, dA * A, mask=d < D)
    tl.store(sums + R + 2, dskip, mask=d < D)
