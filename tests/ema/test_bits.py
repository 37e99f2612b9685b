"""Every implementation gives the same bits, and equal weights keep theirs."""

from itertools import product

import pytest
import torch
from torch import Tensor

from dpo_fast.functional.ema import EmaPlan, ema_offsets, make_shadow
from tests.ema.common import (
    DTYPES,
    HALF,
    IMPLEMENTATIONS,
    ROUNDINGS,
    assert_same_bits,
    bits,
    make_plan,
    shadow_of,
    weights,
)

SIZES = (1, 7, 97, 1031, 40_009)  # beside lanes (8, 16), draws (128, 256), chunk (32768), block
OFFSETS = (3, 8, 17, 2**40 - 5, 2**32 - 1000)


def result(
    implementation: str, refs: list[Tensor], policies: list[Tensor], **how: object
) -> list[Tensor]:
    """References and shadows after one update of copies."""
    own = [ref.clone() for ref in refs]
    shadow = shadow_of(own) if how.pop("shadowed") else None
    plan = make_plan(implementation, own, policies, shadow=shadow, offsets=OFFSETS)
    plan.update_(**how)  # type: ignore[arg-type]
    return own + [s for s in shadow or [] if s is not None]


@pytest.mark.parametrize("implementation", [i for i in IMPLEMENTATIONS if i != "scalar"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_implementations_agree_with_the_scalar_code(
    implementation: str, dtype: torch.dtype
) -> None:
    for policy_dtype, shadowed, rounding in product(DTYPES, (False, True), ROUNDINGS):
        refs = [weights(n, dtype, spread=6) for n in SIZES]
        policies = [weights(n, policy_dtype, spread=6) for n in SIZES]
        for alpha in (0.001, 0.3, 0.5, 0.6, 1.0):
            how = {"alpha": alpha, "rounding": rounding, "seed": 2**63 + 5, "step": 2**35 + 1}
            got = result(implementation, refs, policies, shadowed=shadowed, **how)
            want = result("scalar", refs, policies, shadowed=shadowed, **how)
            assert_same_bits(got, want, (policy_dtype, shadowed, how))
            changed = [bool((bits(a) != bits(b)).any()) for a, b in zip(got, refs, strict=False)]
            assert all(changed[2:]), "nothing was updated"


def all_patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type, signalling NaNs too; random bits of float32."""
    if dtype in HALF:
        return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    patterns = torch.randint(-(2**31), 2**31, (100_003,), dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-45])
    return torch.cat((patterns.view(torch.float32), special))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_equal_weights_keep_every_bit(
    implementation: str, dtype: torch.dtype, rounding: str
) -> None:
    before = all_patterns(dtype)
    for alpha in (0.001, 0.3, 0.5, 0.6, 0.999, 1.0):
        ref = before.clone()
        plan = make_plan(implementation, [ref], [before])
        plan.update_(alpha, rounding=rounding, seed=1)  # type: ignore[arg-type]
        assert_same_bits([ref], [before], alpha)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_equal_weights_with_a_shadow_keep_every_bit(
    implementation: str, dtype: torch.dtype, rounding: str
) -> None:
    everything = all_patterns(dtype)
    keeps = ~everything.isnan()
    if dtype == torch.bfloat16:  # conversions keep the bits of quiet NaNs; float16's do not
        keeps |= (bits(everything) & 0x40) != 0
    before = everything[keeps]
    for alpha in (0.001, 0.3, 0.5, 0.6, 0.999, 1.0):
        ref = before.clone()
        shadow = make_shadow([ref])
        master = shadow[0]
        assert master is not None
        start = master.clone()
        plan = make_plan(implementation, [ref], [before], shadow=shadow)
        plan.update_(alpha, rounding=rounding, seed=1)  # type: ignore[arg-type]
        assert_same_bits([ref, master], [before, start], alpha)


INF, NAN = float("inf"), float("nan")
BIG = torch.finfo(torch.float32).max
SPECIAL = [  # reference, policy, alpha, value; a NaN means the canonical one
    (-0.0, -0.0, 0.3, -0.0),
    (-0.0, -0.0, 0.7, -0.0),
    (1.0, -0.0, 1.0, -0.0),
    (INF, INF, 0.3, INF),
    (-INF, -INF, 0.7, -INF),
    (INF, -INF, 0.3, NAN),
    (INF, 1.0, 0.3, NAN),
    (INF, 1.0, 1.0, 1.0),
    (1.0, INF, 0.3, INF),
    (1.0, INF, 1.0, INF),
    (1.0, NAN, 0.3, NAN),
    (NAN, 1.0, 0.3, NAN),
    (NAN, 1.0, 1.0, 1.0),
    (1.0, NAN, 1.0, NAN),
    (BIG, -BIG, 0.3, -INF),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shadowed", [False, True])
def test_special_values(implementation: str, shadowed: bool) -> None:
    canonical = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
    for dtype, rounding in product(DTYPES, ROUNDINGS):
        for ref_value, policy_value, alpha, expected in SPECIAL:
            if ref_value == BIG and dtype != torch.float32:
                continue
            # in the lanes, in the tail behind them, and among ordinary weights
            ref, policy = weights(301, dtype), weights(301, torch.float32).to(dtype)
            for at in (0, 20, 96, 300):
                ref[at], policy[at] = ref_value, policy_value
            shadow = make_shadow([ref]) if shadowed else None
            plan = make_plan(implementation, [ref], [policy], shadow=shadow)
            plan.update_(alpha, rounding=rounding)
            want = torch.tensor(expected, dtype=dtype)
            if expected != expected:
                want = torch.tensor(canonical[dtype]).to(bits(ref).dtype).view(dtype)
            for at in (0, 20, 96, 300):
                about = (dtype, rounding, ref_value, policy_value, alpha, at)
                assert_same_bits([ref[at]], [want], about)
            assert bool(ref[1:20].isfinite().all())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_beyond_the_largest_number_round_to_nearest(implementation: str) -> None:
    big = 0x7F7F0000
    patterns = torch.tensor([big, big + 0x7FFF, big + 0x8000, big + 0xFFFF], dtype=torch.int32)
    for dtype, policy in (
        (torch.bfloat16, patterns.view(torch.float32)),
        (torch.float16, torch.tensor([65504.0, 65519.996, 65520.0, 1e6])),
    ):
        largest = torch.finfo(dtype).max
        expected = torch.tensor([largest, largest, INF, INF], dtype=dtype)
        for sign, rounding in product((1.0, -1.0), ROUNDINGS):
            ref = torch.zeros(40, 4, dtype=dtype)
            target = (sign * policy).repeat(40, 1)
            make_plan(implementation, [ref], [target]).update_(1.0, rounding=rounding)
            assert_same_bits([ref], [(sign * expected.float()).to(dtype).repeat(40, 1)], rounding)


def test_sharding_does_not_matter() -> None:
    sizes = (5000, 37, 801)
    policies = [weights(n, torch.bfloat16) for n in sizes]
    start = [weights(n, torch.bfloat16) for n in sizes]
    whole = [ref.clone() for ref in start]
    EmaPlan(whole, policies).update_(0.1, rounding="stochastic", seed=7, step=3)
    for num_shards in (2, 3, 8):
        parts = []
        for shard in range(num_shards):
            refs, pieces, offsets = [], [], []
            for ref, policy, at in zip(start, policies, ema_offsets(sizes), strict=True):
                size = -(-ref.numel() // num_shards)  # FSDP2: the last shards are short or empty
                begin = min(shard * size, ref.numel())
                refs.append(ref[begin : begin + size].clone())
                pieces.append(policy[begin : begin + size])
                offsets.append(at + begin)
            EmaPlan(refs, pieces, offsets=offsets).update_(
                0.1, rounding="stochastic", seed=7, step=3
            )
            parts.append(refs)
        assert_same_bits([torch.cat(shards) for shards in zip(*parts, strict=True)], whole)


def test_number_of_threads_does_not_matter() -> None:
    threads = torch.get_num_threads()
    policies = [weights(n, torch.bfloat16) for n in (200_000, 3, 70_001)]
    start = [weights(n, torch.bfloat16) for n in (200_000, 3, 70_001)]
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            refs = [ref.clone() for ref in start]
            EmaPlan(refs, policies).update_(0.1, rounding="stochastic", seed=7)
            results.append(refs)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_stray_writes(implementation: str) -> None:
    """Bytes around references and shadows, and the policy, stay as they are."""
    for dtype, rounding, start in product(HALF, ROUNDINGS, (1, 5)):
        arena = weights(3000, dtype)
        masters = weights(3000, torch.float32)
        policy = weights(1000, torch.float32)
        before, before_masters, before_policy = arena.clone(), masters.clone(), policy.clone()
        inside = slice(start, start + 1000)
        plan = make_plan(implementation, [arena[inside]], [policy], shadow=[masters[inside]])
        plan.update_(0.6, rounding=rounding)
        outside = torch.ones(3000, dtype=torch.bool)
        outside[inside] = False
        assert_same_bits([arena[outside], policy], [before[outside], before_policy])
        assert_same_bits([masters[outside]], [before_masters[outside]])
        assert bool((bits(arena[inside]) != bits(before[inside])).any())
