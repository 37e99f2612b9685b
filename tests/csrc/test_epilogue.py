"""The compiled epilogue: every instruction set against the torch twin; exp to 2 ulp."""

import itertools

import pytest
import torch

from dpo_fast.chunked import epilogue_torch
from dpo_fast.chunked.epilogue import epilogue_, exponentials_
from dpo_fast.naive import OUTPUTS
from tests.tolerances import error

_C = pytest.importorskip("dpo_fast._C", reason="the compiled module was not built")

ISAS = _C.epilogue_isas()
NAN, INF = float("nan"), float("inf")
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "scale": {"scale": 0.3},
    "all": {"bias": True, "softcap": 4.0, "scale": 1.7},
}


def make(rows, vocab, *, bias=False, softcap=None, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=g) * 5
    target = torch.randint(vocab, (rows,), generator=g)
    if rows > 2:
        target[0], target[1] = 0, vocab - 1
        logits[2, target[2]] += 25  # confident
    head = {
        "bias": torch.randn(vocab, generator=g) if bias else None,
        "softcap": softcap,
        "scale": scale,
    }
    return logits, target, head


def twin(logits, target, head, dtype, **options):
    bias = None if head["bias"] is None else head["bias"].to(dtype)
    chunk = logits.to(dtype, copy=True)
    rows = epilogue_torch.epilogue_(
        chunk, target, **{**head, "bias": bias}, store=True, outputs=OUTPUTS
    )
    return chunk, rows


def test_instruction_sets_are_listed_best_first():
    assert ISAS[-1] == "scalar" and set(ISAS) <= {"avx512", "avx2", "scalar"}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("rows", "vocab"),
    [(1, 1), (3, 2), (4, 7), (5, 16), (5, 17), (6, 31), (3, 64), (3, 100), (7, 1000), (4, 4099)],
)
@pytest.mark.parametrize("isa", ISAS)
def test_rows_against_the_twin_in_float64(isa, rows, vocab, name):
    logits, target, head = make(rows, vocab, **OPTIONS[name])
    gold_chunk, gold = twin(logits, target, head, torch.float64)
    eager_chunk, eager = twin(logits, target, head, torch.float32)
    chunk = logits.clone()
    found = epilogue_(chunk, target, **head, store=True, outputs=OUTPUTS, isa=isa)
    for field in gold._fields:
        ours, theirs, right = (getattr(r, field) for r in (found, eager, gold))
        if field in ("shift", "rest", "total"):
            continue  # internal, and only together meaningful
        if field == "is_top1":
            assert torch.equal(ours, right)
            continue
        size = right.abs().max().item()
        assert torch.isfinite(ours).all(), field
        assert error(ours, right) <= 2 * error(theirs, right) + 4e-7 * max(1.0, size), field
    # What the chunk is for: E / S. A rounding of the shift is in both and cancels.
    ours, theirs, right = (
        c / r.total.unsqueeze(1)
        for c, r in ((chunk, found), (eager_chunk, eager), (gold_chunk, gold))
    )
    assert error(ours, right) <= 2 * error(theirs, right) + 3e-7


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_exponentials_give_the_stored_chunk_again(isa, name):
    logits, target, head = make(6, 333, **OPTIONS[name])
    stored, again = logits.clone(), logits.clone()
    rows = epilogue_(stored, target, **head, store=True, isa=isa)
    exponentials_(again, target, shift=rows.shift, rest=rows.rest, **head, isa=isa)
    assert torch.equal(stored, again)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_values_do_not_depend_on_what_else_is_asked_for(isa, name):
    logits, target, head = make(6, 333, **OPTIONS[name])
    results = []
    for store, outputs in itertools.product((False, True), ((), OUTPUTS)):
        chunk = logits.clone()
        results.append(epilogue_(chunk, target, **head, store=store, outputs=outputs, isa=isa))
        assert torch.equal(chunk, logits) or store
    for rows in results[1:]:
        for a, b in zip(results[0][:4], rows[:4], strict=True):
            assert torch.equal(a, b)


def exponent_of(x, isa):
    """The compiled exp of each x <= 0: logits [0, x], target the 0."""
    logits = torch.stack((torch.zeros_like(x), x), 1)
    wide = torch.full((len(x), 34), -INF)  # whole lanes: the x stands in a full vector
    wide[:, 0], wide[:, 20] = logits[:, 0], logits[:, 1]
    target = torch.zeros(len(x), dtype=torch.int64)
    epilogue_(wide, target, bias=None, softcap=None, scale=1.0, store=True, isa=isa)
    return wide[:, 20]


@pytest.mark.parametrize("isa", ISAS)
def test_exp_is_within_two_units_in_the_last_place(isa):
    x = -torch.cat((torch.linspace(0, 87, 200_001), torch.rand(50_000), torch.rand(1000) * 1e-6))
    gold = x.double().exp()
    found = exponent_of(x, isa).double()
    ulp = torch.finfo(torch.float32).eps * 2.0 ** torch.floor(torch.log2(gold))
    assert ((found - gold).abs() / ulp).max() <= 2.0
    assert exponent_of(torch.tensor([0.0, -0.0]), isa).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("isa", ISAS)
def test_exp_of_very_negative_numbers(isa):
    x = torch.tensor([-87.5, -95.0, -103.0, -105.0, -1e6, -3e38, -INF])
    gold = x.double().exp()
    found = exponent_of(x, isa).double()
    assert ((found - gold).abs() <= 1.5e-45).all()  # one step of the denormals
    assert found[-3:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("isa", ISAS)
def test_tanh_keeps_relative_precision_of_value_and_slope(isa):
    a = torch.cat((torch.linspace(-12, 12, 20_001), torch.logspace(-6, 0, 500)))
    logits = torch.full((len(a), 40), -1e30)
    logits[:, 3] = a  # the target
    target = torch.full((len(a),), 3)
    cap = 1.0
    rows = epilogue_(logits, target, bias=None, softcap=cap, scale=1.0, store=True, isa=isa)
    t = a.double().tanh()
    others = 39 * (-1.0 - t.clamp_min(-1.0)).exp()
    gold = -others.log1p()
    assert ((rows.logps.double() - gold).abs() <= 1e-6).all()
    slope = -logits[:, 3].double() / rows.rest.double()
    right = 1 / a.double().cosh().square()
    assert ((slope - right).abs() / right).max() < 2e-6


@pytest.mark.parametrize("position", [0, 15, 16, 40, 63, 64, 70])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("isa", ISAS)
def test_non_finite_logits_at_any_place(isa, softcap, value, position):
    logits, _, head = make(1, 71, softcap=softcap)
    logits[0, position] = value
    for y in (0, 40, 70):
        target = torch.tensor([y])
        gold_chunk, gold = twin(logits, target, head, torch.float64)
        chunk = logits.clone()
        found = epilogue_(chunk, target, **head, store=True, outputs=OUTPUTS, isa=isa)
        for field in ("logps", *OUTPUTS):
            a, b = getattr(found, field), getattr(gold, field)
            torch.testing.assert_close(a, b.to(a.dtype), equal_nan=True, msg=field)
        used = [c / r.total.unsqueeze(1) for c, r in ((chunk, found), (gold_chunk, gold))]
        assert torch.equal(used[0].isnan(), used[1].isnan())


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_written_outside_the_rows(isa):
    vocab, stride = 37, 48
    logits, target, head = make(5, vocab, bias=True)
    memory = torch.full((7, stride), 1234.5)
    chunk = memory[1:6, :vocab]
    chunk.copy_(logits)
    epilogue_(chunk, target, **head, store=True, outputs=OUTPUTS, isa=isa)
    assert (memory[0] == 1234.5).all() and (memory[6] == 1234.5).all()
    assert (memory[:, vocab:] == 1234.5).all()
    expected = logits.clone()
    epilogue_(expected, target, **head, store=True, isa=isa)
    assert torch.equal(chunk, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(isa):
    logits, target, head = make(33, 501, softcap=5.0)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            chunk = logits.clone()
            rows = epilogue_(chunk, target, **head, store=True, outputs=OUTPUTS, isa=isa)
            found.append((chunk, *rows))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_no_rows():
    chunk = torch.empty(0, 5)
    rows = epilogue_(
        chunk, torch.empty(0, dtype=torch.int64), bias=None, softcap=None, scale=1.0, store=True
    )
    assert rows.logps.shape == (0,)


def test_unknown_instruction_set_and_bad_sizes():
    logits, target, head = make(2, 8)
    with pytest.raises(ValueError, match=r"isa='sse'.*'auto'"):
        epilogue_(logits, target, **head, store=True, isa="sse")
    with pytest.raises(ValueError, match="stride=3"):
        _C.epilogue(0, 1, 8, 3, 0, 0, 0.0, 1.0, 0, True, False, "auto", 1)


def test_one_thread_pool_is_shared_with_torch():
    """libgomp has torch's soname, so the process has one: torch's own, which was imported first."""
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) == 1, runtimes
