"""The compiled LM head: every instruction set against float64, guarded memory, and invariance.

Legend: N rows, H hidden, V vocabulary, r rank of the head's adapter.
"""

import itertools

import pytest
import torch

from dpo_fast.backends import LinearHead, Needs, cpu_refusal
from dpo_fast.backends.interface import ROW_MULTIPLE
from dpo_fast.naive import OUTPUTS, HeadLoRA
from tests.tolerances import relative_error

if cpu_refusal("cpu", torch.float32) is not None:
    pytest.skip(cpu_refusal("cpu", torch.float32), allow_module_level=True)

from dpo_fast import _C
from dpo_fast.backends.cpu_backend import CpuBackend
from dpo_fast.chunked import ChunkedBackend

ISAS = _C.head_isas()
ALL = Needs(hidden=True, weight=True, bias=True, lora_a=True, lora_b=True)
TILE = _C.head_tile
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "scale": {"scale": 0.3},
    "lora": {"rank": 3},
    "all": {"bias": True, "softcap": 4.0, "scale": 1.7, "rank": 33},
}
SHAPES = [  # rows, hidden, vocabulary: panels of 24 or 48 rows, blocks of 16 or 32, tiles of 240
    (1, 1, 1),
    (1, 5, 3),
    (24, 16, 240),
    (25, 17, 241),
    (48, 32, 480),
    (49, 33, 239),
    (47, 31, 1201),
    (700, 8, 300),  # more panels than share a packed tile
    (30, 1100, 500),  # K in several parts, fewer slabs
    (20, 8, 9001),  # more tiles than slabs
]


def make(rows, width, vocab, *, bias=False, softcap=None, scale=1.0, rank=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows * 7 + width)
    normal = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    weight = (normal(vocab, width).float() * 3 / width**0.5).to(dtype)
    hidden = normal(rows, width)
    target = torch.randint(vocab, (rows,), generator=g)
    if rows > 3:
        target[0], target[1], target[2] = 0, vocab - 1, target[3]  # two rows of one target
        hidden[3] = weight[target[3]] * 4
    lora = HeadLoRA(normal(rank, width), normal(vocab, rank) * 0.2, 0.5) if rank else None
    return hidden, target, LinearHead(weight, normal(vocab) if bias else None, softcap, scale, lora)


def doubled(head):
    move = lambda t: None if t is None else t.double()
    lora = None
    if head.lora is not None:
        lora = HeadLoRA(head.lora.a.double(), head.lora.b.double(), head.lora.scale)
    return head._replace(weight=head.weight.double(), bias=move(head.bias), lora=lora)


def needs_of(head, base=ALL):
    lora = head.lora is not None
    return base._replace(
        bias=base.bias and head.bias is not None,
        lora_a=base.lora_a and lora,
        lora_b=base.lora_b and lora,
    )


def run(backend, hidden, target, head, needs, store, dlogps):
    found = backend.forward(hidden, head, target, needs=needs, outputs=OUTPUTS, store=store)
    return found.result, backend.backward(found.saved, dlogps.to(found.result.logps.dtype))


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_against_float64(isa, shape, name, store):
    hidden, target, head = make(*shape, **HEADS[name])
    needs = needs_of(head)
    dlogps = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    ours, grads = run(CpuBackend(isa), hidden, target, head, needs, store, dlogps)
    gold, gold_grads = run(
        ChunkedBackend(), hidden.double(), target, doubled(head), needs, store, dlogps
    )
    assert torch.equal(ours.is_top1, gold.is_top1)
    for field in ("logps", "entropy", "mean_logit", "log_sum_sq_probs"):
        a, b = getattr(ours, field), getattr(gold, field)
        size = max(1.0, b.abs().max().item())
        assert ((a - b).abs().max() <= 1e-5 * size).item(), field
    for field, grad in gold_grads._asdict().items():
        found = getattr(grads, field)
        if grad is None:
            assert found is None
        elif grad.norm() == 0:
            assert (found == 0).all()
        else:
            assert relative_error(found, grad) < 3e-6, field


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_narrow_weights_are_widened_exactly(isa, dtype):
    hidden, target, head = make(50, 37, 500, dtype=dtype, **HEADS["all"])
    wide = head._replace(
        weight=head.weight.float(),
        bias=head.bias.float(),
        lora=HeadLoRA(head.lora.a.float(), head.lora.b.float(), head.lora.scale),
    )
    dlogps = torch.randn(50)
    for store in (True, False):
        narrow = run(CpuBackend(isa), hidden, target, head, ALL, store, dlogps)
        exact = run(CpuBackend(isa), hidden.float(), target, wide, ALL, store, dlogps)
        for a, b in zip(itertools.chain(*narrow), itertools.chain(*exact), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["plain", "bias", "softcap"])
@pytest.mark.parametrize("isa", ISAS)
def test_a_rows_result_depends_on_that_row_alone(isa, name):
    """Bit for bit: whatever stands around it, wherever it stands, gradients taken or not.

    With an adapter ``x A^T`` is torch's product, which does not promise that.
    """
    hidden, target, head = make(131, 40, 2000, **HEADS[name])
    backend, needs = CpuBackend(isa), needs_of(head)
    whole = backend.forward(hidden, head, target, needs=needs, outputs=OUTPUTS, store=True)
    dx = whole.saved.tensors[1]
    for part in (slice(0, 1), slice(130, 131), slice(60, 64), slice(1, 131)):
        x, y = hidden[part], target[part]
        for store in (True, False):
            alone = backend.forward(x, head, y, needs=needs, outputs=OUTPUTS, store=store)
            for a, b in zip(alone.result, whole.result, strict=True):
                assert torch.equal(a, b[part])
            assert torch.equal(alone.saved.tensors[1], dx[part])
        plain = backend.forward(x, head, y, needs=Needs(), outputs=(), store=False)
        assert torch.equal(plain.result.logps, whole.result.logps[part])


@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(isa):
    hidden, target, head = make(150, 40, 3000, **HEADS["bias"])
    dlogps = torch.randn(150)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            for store in (True, False):
                values = run(CpuBackend(isa), hidden, target, head, needs_of(head), store, dlogps)
                found.append([t for t in itertools.chain(*values) if t is not None])
    finally:
        torch.set_num_threads(before)
    for i, other in enumerate(found[2:]):
        assert all(torch.equal(a, b) for a, b in zip(found[i % 2], other, strict=True))


GUARD = 1234.5


class Guarded:
    """A tensor between two guards, filled with NaN: overruns and reads of nothing both show."""

    def __init__(self, *shape, margin=64):
        self.shape, count = shape, 1
        for size in shape:
            count *= size
        self.memory = torch.full((count + 2 * margin,), GUARD)
        self.inside = self.memory[margin : margin + count]
        self.inside.fill_(float("nan"))
        self.tensor = self.inside.view(shape)

    def check(self, name):
        margin = (len(self.memory) - len(self.inside)) // 2
        assert (self.memory[:margin] == GUARD).all(), f"{name}: written before"
        assert (self.memory[len(self.memory) - margin :] == GUARD).all(), f"{name}: written after"

    def address(self):
        return self.inside.data_ptr()


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 3, 5), (49, 33, 241), (26, 40, 1200)], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_written_or_read_outside(isa, shape, threads, store, statistics):
    rows, width, vocab = shape
    hidden, target, head = make(*shape, bias=True, rank=2)
    xa = torch.mm(hidden, head.lora.a.t()) * head.lora.scale
    dx, eb = Guarded(rows, width), Guarded(rows, 2)
    dw, db, dbias = Guarded(vocab, width), Guarded(vocab, 2), Guarded(vocab)
    columns = Guarded(_C.head_columns, rows)

    def call(with_dx):
        one = _C.Head(rows, vocab, target.data_ptr(), head.bias.data_ptr(), 0.0, 1.0, isa, threads)
        for weight, x, d, g in ((head.weight, hidden, dx, dw), (head.lora.b, xa, eb, db)):
            one.add_source(
                weight.data_ptr(),
                0,
                weight.stride(0),
                x.shape[1],
                x.data_ptr(),
                d.address() if with_dx else 0,
                0 if with_dx else g.address(),
            )
        return one

    forward = call(True)
    stored = Guarded(forward.stored_bytes() // 4) if store else None
    assert forward.stored_bytes() <= 4 * -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE * (
        -(-vocab // TILE) * (TILE + 1)
    )
    room = Guarded(-(-forward.forward_scratch() // 4))
    forward.forward(columns.address(), stored.address() if store else 0, statistics, room.address())
    room.check("forward scratch")
    backward = call(False)
    room = Guarded(-(-backward.backward_scratch() // 4))
    v = torch.randn(rows)
    one, two, eight = (columns.tensor[i].data_ptr() for i in (1, 2, 8))
    memory = stored.address() if store else 0
    backward.backward(v.data_ptr(), one, two, eight, memory, dbias.address(), False, room.address())
    room.check("backward scratch")
    named = {"dx": dx, "eb": eb, "dw": dw, "db": db, "dbias": dbias, "columns": columns}
    for name, guarded in named.items():
        guarded.check(name)
        used = guarded.tensor
        if name == "columns" and not statistics:
            used = used[[0, 1, 2, 3, 8]]
        assert torch.isfinite(used).all(), name
    if store:
        stored.check("stored")


@pytest.mark.parametrize("isa", ISAS)
def test_gradients_are_added_to_what_is_there(isa):
    hidden, target, head = make(60, 20, 700, **HEADS["all"])
    backend, dlogps = CpuBackend(isa), torch.randn(60)
    for store in (True, False):
        found = backend.forward(hidden, head, target, needs=ALL, outputs=(), store=store)
        fresh = backend.backward(found.saved, dlogps)
        start = fresh._replace(hidden=None)._replace(
            weight=torch.randn(700, 20),
            bias=torch.randn(700),
            lora_a=torch.randn(33, 20),
            lora_b=torch.randn(700, 33),
        )
        before = {k: t.clone() for k, t in start._asdict().items() if t is not None}
        total = backend.backward(found.saved, dlogps, into=start)
        for name, old in before.items():
            assert getattr(total, name) is getattr(start, name)
            torch.testing.assert_close(getattr(total, name), old + getattr(fresh, name))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("column", [0, 130, 239, 240, 500])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("isa", ISAS)
def test_non_finite_logits(isa, softcap, column, value):
    """Through the bias, so that only one column is hit: values and gradients as in float64."""
    hidden, target, head = make(5, 4, 501, bias=True, softcap=softcap)
    head.bias[column] = value
    target = torch.tensor([0, 130, 239, 240, 500])
    needs, dlogps = needs_of(head), torch.randn(5)
    for store in (True, False):
        ours, grads = run(CpuBackend(isa), hidden, target, head, needs, store, dlogps)
        gold, right = run(
            ChunkedBackend(), hidden.double(), target, doubled(head), needs, store, dlogps
        )
        for field, a, b in zip(ours._fields, ours, gold, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), equal_nan=True, msg=field)
        for field in ("hidden", "weight", "bias"):
            a, b = getattr(grads, field), getattr(right, field)
            torch.testing.assert_close(
                a, b.to(a.dtype), equal_nan=True, rtol=1e-4, atol=1e-5, msg=field
            )


@pytest.mark.parametrize("isa", ISAS)
def test_the_maximum_may_come_late_and_grow_often(isa):
    """Logits that rise along the vocabulary: every tile moves the shift of every row."""
    vocab = 16 * TILE + 5
    weight = torch.linspace(-60, 60, vocab).unsqueeze(1)
    hidden = torch.tensor([[1.0], [-1.0], [0.3], [0.0]])
    for y in (0, TILE, vocab // 2, vocab - 1):
        target = torch.full((4,), y)
        head, one = LinearHead(weight, None, None, 1.0, None), torch.ones(4)
        ours, grads = run(CpuBackend(isa), hidden, target, head, needs_of(head), True, one)
        gold, right = run(
            ChunkedBackend(), hidden.double(), target, doubled(head), needs_of(head), True, one
        )
        torch.testing.assert_close(ours.logps.double(), gold.logps, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.entropy.double(), gold.entropy, rtol=1e-5, atol=1e-6)
        assert relative_error(grads.hidden, right.hidden) < 1e-5
        assert relative_error(grads.weight, right.weight) < 1e-5


def test_strides_of_the_weight():
    hidden, target, head = make(30, 20, 300)
    wide = torch.full((300, 50), NAN)
    wide[:, 7:27] = head.weight
    expanded = head.weight[:1].expand(300, 20)
    transposed = head.weight.t().contiguous().t()
    backend, c, needs = CpuBackend(), hidden[:, 0], Needs(hidden=True, weight=True)
    for weight in (wide[:, 7:27], expanded, transposed):
        same = head._replace(weight=weight.contiguous())
        for store in (True, False):
            other = head._replace(weight=weight)
            a = run(backend, hidden, target, other, needs, store, c)
            b = run(backend, hidden, target, same, needs, store, c)
            assert torch.equal(a[0].logps, b[0].logps)
            assert torch.equal(a[1].hidden, b[1].hidden)
            assert torch.equal(a[1].weight, b[1].weight)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"isa='scalar'.*'auto'"):
        _C.Head(1, 1, 0, 0, 0.0, 1.0, "scalar", 1)
    with pytest.raises(ValueError, match=r"vocab=0"):
        _C.Head(1, 0, 0, 0, 0.0, 1.0, "auto", 1)
    head = _C.Head(1, 5, 0, 0, 0.0, 1.0, "auto", 1)
    with pytest.raises(ValueError, match=r"cols=4 stride=3"):
        head.add_source(0, 0, 3, 4, 0, 0, 0)


def test_the_panel_is_what_buffers_are_rounded_to():
    assert ROW_MULTIPLE % _C.head_panel_rows == 0
