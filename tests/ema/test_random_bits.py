"""The random bits of stochastic rounding: published vectors, statistics, what they depend on."""

import pytest
import torch
from torch import Tensor

from dpo_fast.backends.ema.philox import (
    PER_COUNTER,
    counter_halves,
    philox_words,
    random16,
)
from tests.ema.common import IMPLEMENTATIONS, make_plan

# Random123 (Salmon et al.), kat_vectors, philox4x32 with 7 rounds: counter, key -> words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_published_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    group = counter[0] | counter[1] << 32
    signed = group - 2**64 if group >= 2**63 else group
    seed, step = key[0] | key[1] << 32, counter[2] | counter[3] << 32
    assert philox_words(torch.tensor([signed]), seed, step)[0].tolist() == list(words)


def test_a_counter_serves_four_octets_in_order() -> None:
    """The halves of a published vector, then each with the one 1, 2 and 3 places further on."""
    halves = [half for word in KNOWN[0][2] for half in (word & 0xFFFF, word >> 16)]
    expected = list(halves)
    for by in (1, 2, 3):
        expected += [halves[k] ^ halves[(k + by) % 8] for k in range(8)]
    assert random16(0, 32, 0, 0, torch.device("cpu")).tolist() == expected
    assert random16(3, 27, 0, 0, torch.device("cpu")).tolist() == expected[3:30]


def test_any_two_values_of_a_counter_are_independent() -> None:
    """Each is a sum (XOR) of halves, none is empty, and no two are the same sum."""
    columns = []
    for k in range(8):  # one bit in half k alone: which values does it reach
        word = torch.zeros(1, 4, dtype=torch.int64)
        word[0, k // 2] = 1 << (16 * (k % 2))
        columns.append(counter_halves(word)[0] != 0)
    sums = torch.stack(columns, dim=1).tolist()
    assert len(sums) == PER_COUNTER
    assert len({tuple(row) for row in sums} | {(False,) * 8}) == PER_COUNTER + 1


def drawn(implementation: str, count: int, seed: int, step: int, offset: int = 0) -> Tensor:
    """The bits an implementation draws, read off its rounding by bisection: int64 [count].

    With alpha = 1 the value is the policy, 1 + fraction / 2**23; it rounds up in bf16 if and only
    if fraction + random >= 2**16.
    """
    fraction = torch.zeros(count, dtype=torch.int32)
    for bit in reversed(range(16)):
        trial = fraction + (1 << bit)
        policy = (trial + 0x3F800000).view(torch.float32)
        ref = torch.zeros(count, dtype=torch.bfloat16)
        plan = make_plan(implementation, [ref], [policy], offsets=[offset])
        plan.update_(1.0, rounding="stochastic", seed=seed, step=step)
        fraction = torch.where(ref > 1, fraction, trial)  # the largest that rounds down
    return 0xFFFF - fraction.long()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("offset", [0, 5, 2**33 + 3])
def test_bits_are_the_documented_ones(implementation: str, offset: int) -> None:
    seed, step = 0x299F31D0A4093822, 0x0370734413198A2E
    expected = random16(offset, 703, seed, step, torch.device("cpu"))
    assert drawn(implementation, 703, seed, step, offset).tolist() == expected.tolist()


def test_uniform_and_uncorrelated() -> None:
    """Mean, every bit, neighbours, steps and seeds: within 4.5 standard errors."""
    n = 2**18
    cpu = torch.device("cpu")
    base = random16(0, n, 1, 1, cpu).double() / 65535 - 0.5
    others = {
        "next element": random16(1, n, 1, 1, cpu),
        "next octet": random16(8, n, 1, 1, cpu),
        "octet after the next": random16(16, n, 1, 1, cpu),
        "next counter": random16(PER_COUNTER, n, 1, 1, cpu),
        "next step": random16(0, n, 1, 2, cpu),
        "next seed": random16(0, n, 2, 1, cpu),
        "step and seed swapped": random16(0, n, 2**32, 1, cpu),
    }
    limit = 4.5 / n**0.5
    assert abs(base.mean()) < limit * 12**-0.5
    for name, other in others.items():
        correlation = (base * (other.double() / 65535 - 0.5)).mean() * 12
        assert abs(correlation) < limit, name
    values = random16(0, n, 1, 1, cpu)
    for bit in range(16):
        assert abs(((values >> bit) & 1).double().mean() - 0.5) < limit * 0.5, bit
    counts = torch.bincount(values >> 8, minlength=256).double()
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi_square - 255) < 4.5 * (2 * 255) ** 0.5
