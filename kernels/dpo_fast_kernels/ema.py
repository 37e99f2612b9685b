"""EMA of all weights of a model in one launch, for installs without nvcc.

    value = base - weight * (base - other)
    base, other = (policy, ref) if FROM_POLICY else (ref, policy)

Tensors come as a table of addresses, one int64 row a tensor (columns: reference, policy, fp32
shadow or 0, elements, global position of element 0, first chunk, dtype of reference, dtype of
policy; dtypes 0 fp32, 1 bf16, 2 fp16), and a map from chunks of ``CHUNK`` elements to rows. Both
are built once.

Every operation is rounded on its own (launched with ``enable_fp_fusion=False``) and 16-bit rounding
is integer arithmetic, so that the bits are those of ``csrc/ema_math.h``. Random bits: Philox4x32-7
(Salmon et al., SC 2011) as ``csrc/philox.h`` defines them: one counter serves 32 elements.

Memory: 6 bytes a parameter for bf16 reference and policy, 12 with a shadow; nothing is allocated.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (arguments of device functions are typed by the compiler)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements at a time: two 16-byte accesses of bf16 a thread
NUM_WARPS = 8

ROW = tl.constexpr(8)  # columns of the table
F32, BF16, F16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)  # what a computed NaN is written as
MAX_BF16 = tl.constexpr(0x7F7F0000)  # fp32 bits of the largest finite bf16
MAX_F16 = tl.constexpr(0x477FE000)  # of 65504
INF_F16 = tl.constexpr(0x477FF000)  # of 65520: from here on the nearest fp16 is infinity
MIN_NORMAL_F16 = tl.constexpr(0x38800000)  # of 2**-14
REBIAS_F16 = tl.constexpr((127 - 15) << 10)


@triton.jit
def _philox(group, seed_lo, seed_hi, step_lo, step_hi):
    """The four words of each counter."""
    c0, c1 = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + step_lo.to(tl.uint32, bitcast=True)
    c3 = tl.zeros_like(c0) + step_hi.to(tl.uint32, bitcast=True)
    k0 = tl.zeros_like(c0) + seed_lo.to(tl.uint32, bitcast=True)
    k1 = tl.zeros_like(c0) + seed_hi.to(tl.uint32, bitcast=True)
    return tl.philox_impl(c0, c1, c2, c3, k0, k1, 7)


@triton.jit
def _octet(w0, w1, w2, w3, S: tl.constexpr):
    """The words of a counter's octet ``S``: its halves, XOR those ``S`` places further on."""
    if S == 0:
        o0, o1, o2, o3 = w0, w1, w2, w3
    elif S == 2:
        o0, o1, o2, o3 = w0 ^ w1, w1 ^ w2, w2 ^ w3, w3 ^ w0
    else:
        if S == 1:
            a0, a1, a2, a3 = w0, w1, w2, w3
        else:
            a0, a1, a2, a3 = w1, w2, w3, w0
        o0 = w0 ^ ((a0 >> 16) | (a1 << 16))
        o1 = w1 ^ ((a1 >> 16) | (a2 << 16))
        o2 = w2 ^ ((a2 >> 16) | (a3 << 16))
        o3 = w3 ^ ((a3 >> 16) | (a0 << 16))
    return o0, o1, o2, o3


@triton.jit
def _by_place(w0, w1, w2, w3, S: tl.constexpr):
    """The eight values of octet ``S``, indexed ``[..., i, j, k]`` by half k of word 2 * i + j."""
    o0, o1, o2, o3 = _octet(w0, w1, w2, w3, S)
    low = tl.join(tl.join(o0 & 0xFFFF, o2 & 0xFFFF), tl.join(o1 & 0xFFFF, o3 & 0xFFFF))
    high = tl.join(tl.join(o0 >> 16, o2 >> 16), tl.join(o1 >> 16, o3 >> 16))
    return tl.join(low, high)


@triton.jit
def _half(w0, w1, w2, w3, k):
    """Half ``k`` of a counter's eight."""
    word = tl.where(k < 4, tl.where(k < 2, w0, w1), tl.where(k < 6, w2, w3))
    return (word >> (16 * (k & 1))) & 0xFFFF


@triton.jit
def _random16(
    position, seed_lo, seed_hi, step_lo, step_hi, PHASED: tl.constexpr, BLOCK: tl.constexpr
):
    """16 random bits of each element at ``position + arange(BLOCK)``, uint32.

    Not PHASED: position is a multiple of 32, and each counter's 32 values are used at once.
    """
    if PHASED:
        at = position + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = _philox(at >> 5, seed_lo, seed_hi, step_lo, step_hi)
        k, s = (at & 7).to(tl.uint32), ((at >> 3) & 3).to(tl.uint32)
        out = _half(w0, w1, w2, w3, k)
        out = tl.where(s == 0, out, out ^ _half(w0, w1, w2, w3, (k + s) & 7))
    else:
        counter = (position >> 5) + tl.arange(0, BLOCK // 32)
        w0, w1, w2, w3 = _philox(counter, seed_lo, seed_hi, step_lo, step_hi)
        even = tl.join(_by_place(w0, w1, w2, w3, 0), _by_place(w0, w1, w2, w3, 2))
        odd = tl.join(_by_place(w0, w1, w2, w3, 1), _by_place(w0, w1, w2, w3, 3))
        # [counter, i, j, k, high bit of the octet, low bit of it] to the order of the elements
        out = tl.reshape(tl.permute(tl.join(even, odd), (0, 4, 5, 1, 2, 3)), [BLOCK])
    return out


@triton.jit
def _widen(raw, DTYPE: tl.constexpr):
    if DTYPE == F32:
        value = raw.to(tl.float32, bitcast=True)
    elif DTYPE == BF16:
        value = (raw.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = raw.to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _narrow_bf16(bits, random, STOCHASTIC: tl.constexpr):
    magnitude = bits & 0x7FFFFFFF
    addend = 0x7FFF + ((bits >> 16) & 1)
    if STOCHASTIC:
        addend = tl.where(magnitude <= MAX_BF16, random, addend)
    rounded = (bits + addend) >> 16
    return tl.where(magnitude > INFINITY, (bits >> 16) | 0x40, rounded)


@triton.jit
def _narrow_f16(bits, random, STOCHASTIC: tl.constexpr):
    magnitude = bits & 0x7FFFFFFF
    value = magnitude.to(tl.float32, bitcast=True)
    if STOCHASTIC:
        normal = magnitude + (random >> 3)
        in_range = tl.where(magnitude < MIN_NORMAL_F16, value, 0.0)
        units = (in_range * 1099511627776.0).to(tl.int32).to(tl.uint32, bitcast=True)  # 2**40
        small = (units + random) >> 16
    else:
        normal = magnitude + 0xFFF + ((magnitude >> 13) & 1)
        small = (value + 0.5).to(tl.uint32, bitcast=True) - 0x3F000000  # units of 2**-24
    out = tl.where(magnitude < MIN_NORMAL_F16, small, (normal >> 13) - REBIAS_F16)
    out = tl.where(magnitude > MAX_F16, tl.where(magnitude < INF_F16, 0x7BFF, 0x7C00), out)
    out = tl.where(magnitude > INFINITY, 0x7E00 | ((magnitude >> 13) & 0x3FF), out)
    return out.to(tl.uint32) | ((bits >> 16) & 0x8000)


@triton.jit
def _block(
    ref_ptr,
    policy_ptr,
    shadow_ptr,
    offs,
    left,
    position,
    weight,
    seed_lo,
    seed_hi,
    step_lo,
    step_hi,
    REF: tl.constexpr,
    POLICY: tl.constexpr,
    SHADOW: tl.constexpr,
    PHASED: tl.constexpr,
    MASKED: tl.constexpr,
    FROM_POLICY: tl.constexpr,
    COPY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of elements of one tensor; MASKED: those at ``left`` and beyond are left alone."""
    if MASKED:
        mask = offs < left
    else:
        mask = None
    p = _widen(tl.load(policy_ptr + offs, mask=mask), POLICY)
    if SHADOW:
        r = tl.load(shadow_ptr + offs, mask=mask)
    else:
        old = tl.load(ref_ptr + offs, mask=mask)
        r = _widen(old, REF)
    if COPY:
        value = p
    elif FROM_POLICY:
        value = p - weight * (p - r)
    else:
        value = r - weight * (r - p)
    # A NaN leaves equal infinities and pairs of NaNs as they are, and is canonical elsewhere.
    is_nan = value != value
    unchanged = is_nan & ((p == r) | ((p != p) & (r != r)))
    bits = tl.where(is_nan, NAN, value.to(tl.int32, bitcast=True)).to(tl.uint32, bitcast=True)
    if SHADOW:
        bits = tl.where(unchanged, r.to(tl.uint32, bitcast=True), bits)
        tl.store(shadow_ptr + offs, bits.to(tl.float32, bitcast=True), mask=mask)
    if REF == F32:
        out = bits.to(tl.int32, bitcast=True)
    else:
        random = bits
        if STOCHASTIC:
            random = _random16(position, seed_lo, seed_hi, step_lo, step_hi, PHASED, BLOCK)
        if REF == BF16:
            half = _narrow_bf16(bits, random, STOCHASTIC)
        else:
            half = _narrow_f16(bits, random, STOCHASTIC)
        out = half.to(tl.uint16).to(tl.int16, bitcast=True)
    if not SHADOW:
        out = tl.where(unchanged, old, out)
    tl.store(ref_ptr + offs, out, mask=mask)


@triton.jit
def _pointer(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The elements of a chunk as raw integers; ALIGNED: on a boundary of 16 bytes."""
    if DTYPE == F32:
        pointer = (address + start * 4).to(tl.pointer_type(tl.int32))
    else:
        pointer = (address + start * 2).to(tl.pointer_type(tl.int16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


# Words of the generator are data: specialised on the value 1 they would be no tensors.
@triton.jit(do_not_specialize=["seed_lo", "seed_hi", "step_lo", "step_hi"])
def _ema_kernel(
    rows_ptr,  # [tensors, 8] int64
    chunk_rows_ptr,  # [chunks] int32
    variants_ptr,  # [tensors] int32, see variant_code
    weight,
    seed_lo,
    seed_hi,
    step_lo,
    step_hi,
    VARIANTS: tl.constexpr,  # bit v: some tensor is of variant v
    FROM_POLICY: tl.constexpr,
    COPY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = tl.load(chunk_rows_ptr + pid).to(tl.int64)
    variant = tl.load(variants_ptr + row)
    row_ptr = rows_ptr + row * ROW
    start = (pid.to(tl.int64) - tl.load(row_ptr + 5)) * CHUNK
    left = tl.minimum(tl.load(row_ptr + 3) - start, CHUNK).to(tl.int32)
    position = tl.load(row_ptr + 4) + start
    for v in tl.static_range(72):
        if (VARIANTS >> v) & 1:
            if variant == v:
                ALIGNED: tl.constexpr = v % 2 == 1
                PHASED: tl.constexpr = v // 2 % 2 == 1
                SHADOW: tl.constexpr = v // 4 % 2 == 1
                POLICY: tl.constexpr = v // 8 % 3
                REF: tl.constexpr = v // 24
                # Smaller where the random bits or the conversion need the registers.
                HEAVY: tl.constexpr = STOCHASTIC and REF == F16
                SIZE: tl.constexpr = BLOCK // 4 if PHASED or not ALIGNED or HEAVY else BLOCK
                full = left // SIZE * SIZE
                ref_ptr = _pointer(tl.load(row_ptr), start, REF, ALIGNED)
                policy_ptr = _pointer(tl.load(row_ptr + 1), start, POLICY, ALIGNED)
                shadow_ptr = _pointer(tl.load(row_ptr + 2), start, F32, ALIGNED).to(
                    tl.pointer_type(tl.float32)
                )
                if ALIGNED:
                    shadow_ptr = tl.multiple_of(shadow_ptr, 16)
                for at in range(0, full, SIZE):
                    _block(
                        ref_ptr, policy_ptr, shadow_ptr, at + tl.arange(0, SIZE), left,
                        position + at, weight, seed_lo, seed_hi, step_lo, step_hi,
                        REF, POLICY, SHADOW, PHASED, False, FROM_POLICY, COPY, STOCHASTIC, SIZE,
                    )  # fmt: skip
                if full < left:
                    _block(
                        ref_ptr, policy_ptr, shadow_ptr, full + tl.arange(0, SIZE), left,
                        position + full, weight, seed_lo, seed_hi, step_lo, step_hi,
                        REF, POLICY, SHADOW, PHASED, True, FROM_POLICY, COPY, STOCHASTIC, SIZE,
                    )  # fmt: skip


def variant_code(row: list[int]) -> int:
    """Which specialisation of the kernel a row of the table needs."""
    ref, policy, shadow, _, position, _, ref_dtype, policy_dtype = row
    aligned = ref % 16 == policy % 16 == shadow % 16 == 0
    phased = position % 32 != 0
    return ((ref_dtype * 3 + policy_dtype) * 2 + (shadow != 0)) * 4 + phased * 2 + aligned


def _signed32(value: int) -> int:
    """A 32-bit word as Triton types it whatever its value: int32."""
    return value - (1 << 32) if value >= 1 << 31 else value


def ema(
    rows: Tensor,  # [tensors, 8] int64
    chunk_rows: Tensor,  # [chunks] int32
    variants: Tensor,  # [tensors] int32: variant_code of each row
    variant_mask: int,  # bit v: variant v occurs
    chunk: int,
    *,
    weight: float,
    from_policy: bool,
    copy: bool,
    draw: tuple[int, int] | None,
) -> None:
    """Launch once on the current stream of ``rows.device``.

    Args:
        draw: (seed, step), unsigned 64 bits each, for stochastic rounding; None: to nearest.
    """
    seed, step = draw or (0, 0)
    words = [_signed32(v & 0xFFFFFFFF) for v in (seed, seed >> 32, step, step >> 32)]
    options: dict[str, Any] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    with torch.cuda.device_of(rows):
        _ema_kernel[(chunk_rows.numel(),)](
            rows, chunk_rows, variants, weight, *words,
            VARIANTS=variant_mask, FROM_POLICY=from_policy, COPY=copy,
            STOCHASTIC=draw is not None, CHUNK=chunk, BLOCK=BLOCK, **options,
        )  # fmt: skip
