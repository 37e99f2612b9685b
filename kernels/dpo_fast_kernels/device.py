"""Device helpers that every kernel of the LM head shares.

Legend: N scored tokens, H hidden, V vocabulary (of this shard), a accumulator of ``x W^T``.

Units: a row's offset ``k`` and its target logit ``zy`` are logits after the softcap and *before*
the scale, so that ``exp(z - k) = exp2((cap(a) - k) * scale * log2(e))``: the subtraction comes
first, and a large common part of a and k costs nothing. Nothing here can be contracted into a fused
multiply-add, and the launchers pin ``enable_fp_fusion`` off, so that kernels with and without the
store of E agree bit for bit.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (arguments of device functions are typed by the compiler)

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Kinds of rows: `col` holds the target's column in this shard, or one of these. -1 and V mean that
# the target lies in an earlier or a later shard of the vocabulary.
IGNORED = tl.constexpr(-2)
INVALID = tl.constexpr(-3)

# Powers of two that keep sums of squares of E inside float32: E lies in [2**-35, 2**87].
SQUARE_SCALE = tl.constexpr(2.0**-24)


@triton.jit
def softcapped(a, cap):
    """``cap * tanh(a / cap)`` and its slope, exact where tanh saturates: no ``1 - t * t``."""
    u = tl.exp2(tl.abs(a) * (-2.0 * LOG2E / cap))
    r = 1.0 / (1.0 + u)
    t = (1.0 - u) * r
    return tl.where(a < 0, -cap, cap) * t, 4.0 * u * r * r


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to float32 accuracy also for tiny x."""
    s = x / (2.0 + x)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11))))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def next_below(x):
    """The next float32 below x; NaN and -inf stay."""
    bits = x.to(tl.int32, bitcast=True)
    step = tl.where(x > 0, bits - 1, bits + 1)
    step = tl.where(x == 0, -2147483647, step)  # the negative number of least magnitude
    return tl.where(x > float("-inf"), step.to(tl.float32, bitcast=True), x)


@triton.jit
def tile_of(index, num_n, num_v, GROUP_N: tl.constexpr):
    """Row block and vocabulary block of a tile; GROUP_N row blocks in turn share a slab of W."""
    width = GROUP_N * num_v
    group = index // width
    size = min(num_n - group * GROUP_N, GROUP_N)
    pid_n = group * GROUP_N + (index % width) % size
    pid_v = (index % width) // size
    return pid_n, pid_v


@triton.jit
def logit_tile(acc, softcap, HAS_SOFTCAP: tl.constexpr):
    """Softcap of an accumulator tile: (capped logits, slope of the cap)."""
    if HAS_SOFTCAP:
        a, slope = softcapped(acc, softcap)
    else:
        a, slope = acc, 1.0
    return a, slope


@triton.jit
def exp_tile(a, k, col, offs_v, V, scale_log2e):
    """``E = exp(z - k)`` of the non-target columns of scored rows, 0 elsewhere."""
    limit = tl.where(col > IGNORED, V, 0)  # rows that are not scored keep no column
    keep = (offs_v[None, :] < limit[:, None]) & (offs_v[None, :] != col[:, None])
    return tl.where(keep, tl.exp2((a - k[:, None]) * scale_log2e), 0.0)


@triton.jit
def store_statistics(
    part_ptr,  # [5, num_v, ld]; plane 0 holds the sums of E
    plane,  # num_v * ld
    offsets,  # [BLOCK_N] int64
    mask,  # [BLOCK_N]
    e,
    a,
    base,  # [BLOCK_N] the logit that d = z - base is measured from
    zy,  # [BLOCK_N]
    col,
    offs_v,
    V,
    scale,
    HAS_SOFTCAP: tl.constexpr,
):
    """Row sums of one tile for the statistics: E d, E^2, columns that beat the target, logits."""
    if HAS_SOFTCAP:  # without it the mean logit is x . mean(W)
        total = tl.sum(tl.where(offs_v[None, :] < V, a, 0.0), 1)
        tl.store(part_ptr + 4 * plane + offsets, total, mask=mask)
    # A tie counts against the target only in an earlier column: there the bar is one ulp lower.
    below = next_below(zy)
    bar = tl.where(offs_v[None, :] < col[:, None], below[:, None], zy[:, None])
    beats = tl.where((e > 0) & (a > bar), 1.0, 0.0)  # E is 0 in the target's column and outside
    tl.store(part_ptr + 3 * plane + offsets, tl.sum(beats, 1), mask=mask)
    d = tl.maximum(a - base[:, None], -1e30)  # finite, so that E = 0 gives 0
    tl.store(part_ptr + plane + offsets, tl.sum(e * d, 1) * scale, mask=mask)
    small = e * SQUARE_SCALE
    tl.store(part_ptr + 2 * plane + offsets, tl.sum(small * small, 1), mask=mask)
