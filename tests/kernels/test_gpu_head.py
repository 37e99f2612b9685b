"""The LM head's kernels on a GPU: bfloat16 at real sizes, against float64 on the same device."""

import pytest
import torch

from dpo_fast.functional import linear_logprobs
from dpo_fast.naive import HeadLoRA, naive_linear_logprobs
from tests.functional.test_exactness import gold_of, rows_of_confidence
from tests.tolerances import relative_error

pytestmark = pytest.mark.gpu

NAMES = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
LIMIT = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 2e-5}


def make(rows, width, vocab, dtype=torch.bfloat16, *, bias=False, rank=0, seed=0, **kwargs):
    """Leaves on the device; logits of a few units' spread, every third row confident."""
    g = torch.Generator("cuda").manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, device="cuda")
    weight = (normal(vocab, width) * (2.0 / width**0.5)).to(dtype)
    hidden = normal(rows, width)
    target = torch.randint(vocab, (rows,), generator=g, device="cuda")
    hidden[::3] += weight[target[::3]].float() * 4
    leaves = {"hidden": hidden.to(dtype), "weight": weight}
    if bias:
        leaves["bias"] = normal(vocab).to(dtype)
    if rank:
        leaves["a"] = (normal(rank, width) / width**0.5).to(dtype)
        leaves["b"] = normal(vocab, rank).to(dtype)
    return {k: v.requires_grad_() for k, v in leaves.items()}, target, kwargs


def call(function, leaves, target, kwargs, **options):
    lora = HeadLoRA(leaves["a"], leaves["b"], 0.5) if "a" in leaves else None
    return function(
        leaves["hidden"], leaves["weight"], target, bias=leaves.get("bias"), lora=lora, **kwargs,
        **options,
    )  # fmt: skip


def check(made, dtype, *, mode=None, frozen=False, outputs=(), backend="triton", limit=None):
    leaves, target, kwargs = made
    wanted = {k: v for k, v in leaves.items() if not frozen or k in ("hidden", "a")}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    exact = {k: v.detach().double().requires_grad_(k in wanted) for k, v in leaves.items()}
    ours = call(
        linear_logprobs, leaves, target, kwargs, mode=mode, outputs=outputs, backend=backend
    )
    gold = call(naive_linear_logprobs, exact, target, kwargs, outputs=outputs)
    logps, right = (ours.logps, gold.logps) if outputs else (ours, gold)
    assert logps.dtype == torch.float32 and torch.isfinite(logps).all()
    total = right.double().sum().abs()
    assert (logps.double().sum() - right.sum()).abs() <= 1e-3 + 1e-5 * total
    assert (logps.double() - right).abs().max() <= 1e-3 + 1e-5 * right.abs().max()
    if outputs:
        assert (ours.is_top1 != gold.is_top1).double().mean() < 1e-3  # ties within an ulp
        for name in ("entropy", "mean_logit", "log_sum_sq_probs"):
            found, expected = getattr(ours, name).double(), getattr(gold, name)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4, msg=name)
    upstream = torch.randn(logps.shape, device="cuda")
    grads = torch.autograd.grad(logps, list(wanted.values()), upstream)
    expected = torch.autograd.grad(right, [exact[k] for k in wanted], upstream.double())
    for name, a, b in zip(wanted, grads, expected, strict=True):
        assert a.dtype == leaves[name].dtype
        assert relative_error(a, b) <= (limit or LIMIT[dtype]), name


@pytest.mark.parametrize("mode", ["store", "min-memory", "frozen"])
@pytest.mark.parametrize(
    "features",
    [{}, {"bias": True}, {"rank": 8}, {"softcap": 10.0},
     {"bias": True, "rank": 8, "softcap": 10.0, "logit_scale": 0.7, "temperature": 1.3}],
    ids=["plain", "bias", "lora", "softcap", "all"],
)  # fmt: skip
def test_bfloat16(features, mode):
    frozen = mode == "frozen"
    made = make(300, 512, 32001, **features)
    check(made, torch.bfloat16, mode=None if frozen else mode, frozen=frozen)


@pytest.mark.parametrize("features", [{}, {"softcap": 10.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("mode", ["store", "frozen"])
def test_statistics(features, mode):
    frozen = mode == "frozen"
    check(make(300, 512, 32001, **features), torch.bfloat16, frozen=frozen, outputs=NAMES)


@pytest.mark.parametrize(
    ("rows", "width", "vocab"),
    [
        (1, 64, 1000),
        (1, 7, 3),
        (129, 72, 257),
        (1000, 1024, 50257),
        (77, 1023, 4099),
        (5, 8, 151936),
    ],
)
def test_odd_shapes(rows, width, vocab):
    """Both loads: TMA where H % 8 == 0, pointers elsewhere."""
    limit = 8e-3 if rows < 16 else None  # a few elements: no rms of many roundings
    for mode in ("store", "min-memory"):
        check(make(rows, width, vocab), torch.bfloat16, mode=mode, limit=limit)


@pytest.mark.parametrize("mode", ["store", "min-memory"])
def test_main_grad(mode):
    leaves, target, kwargs = make(300, 512, 32001, bias=True)
    upstream = torch.randn(300, device="cuda")
    start = torch.randn(32001, 512, device="cuda")
    main_grad = start.clone()
    for given in (None, main_grad):
        logps = call(
            linear_logprobs, leaves, target, kwargs, mode=mode, backend="triton", main_grad=given
        )
        (logps * upstream).sum().backward()
    assert leaves["weight"].grad.dtype == torch.bfloat16  # of the first alone
    assert relative_error(main_grad - start, leaves["weight"].grad) <= 4e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["store", "min-memory", "frozen"])
def test_logits_from_cublas(dtype, mode):
    frozen = mode == "frozen"
    made = make(300, 512, 32001, dtype, bias=True, softcap=10.0)
    check(made, dtype, mode=None if frozen else mode, frozen=frozen)


def test_strided_inputs():
    leaves, target, kwargs = make(65, 128, 999)
    wide = torch.zeros(65, 200, device="cuda", dtype=torch.bfloat16)
    wide[:, 3:131] = leaves["hidden"].detach()
    leaves["hidden"] = wide[:, 3:131].requires_grad_()  # rows not on 16-byte borders: pointers
    leaves["weight"] = leaves["weight"].detach().T.contiguous().T.requires_grad_()
    check((leaves, target, kwargs), torch.bfloat16)


@pytest.mark.parametrize("mean", [0.0, 8.0])
@pytest.mark.parametrize("odds", [-200.0, -85.0, -20.0, 0.0, 5.0, 15.0, 30.0])
def test_every_confidence(odds, mean):
    hidden, weight, target = rows_of_confidence(odds, torch.bfloat16, mean)
    upstream = torch.full((24,), 1e-6)
    right = gold_of(hidden, weight, target, upstream)
    leaves = [t.cuda().requires_grad_() for t in (hidden, weight)]
    for mode in ("store", "min-memory"):
        logps = linear_logprobs(*leaves, target.cuda(), mode=mode, backend="triton")
        total = right[0].sum()
        assert (logps.double().sum().cpu() - total).abs() <= 1e-3 + 1e-5 * total.abs()
        grads = torch.autograd.grad(logps, leaves, upstream.cuda())
        for found, expected in zip(grads, right[1:], strict=True):
            assert relative_error(found.cpu(), expected) <= 4e-3


def test_off_range_rows_of_every_number():
    leaves, target, _ = make(700, 256, 8001)
    for off in (1, 17, 700):
        with torch.no_grad():
            leaves["hidden"][:off] = leaves["weight"][(target[:off] + 1) % 8001] * 300
        check((leaves, target, {}), torch.bfloat16)
        check((leaves, target, {}), torch.bfloat16, mode="min-memory")


def test_not_finite_rows_stay_alone():
    leaves, target, _ = make(140, 256, 8001)
    clean = linear_logprobs(leaves["hidden"], leaves["weight"], target, backend="triton")
    with torch.no_grad():
        leaves["hidden"][70] = torch.nan
        leaves["hidden"][71] = torch.inf
    found = linear_logprobs(leaves["hidden"], leaves["weight"], target, backend="triton")
    assert found[70:72].isnan().all()
    keep = torch.ones(140, dtype=torch.bool, device="cuda")
    keep[70:72] = False
    assert torch.equal(found[keep], clean[keep])


def test_target_out_of_range_is_nan_without_a_stray_read():
    from dpo_fast_kernels.ops import linear_logprob_fwd

    leaves, target, _ = make(140, 256, 8001)
    target[3], target[77], target[90], target[5] = 8001, 2**40, -1, -100
    hidden, weight = leaves["hidden"], leaves["weight"]
    for backend in ("triton", "chunked"):
        found = linear_logprobs(hidden, weight, target, backend=backend)
        assert found.isnan().nonzero().flatten().tolist() == [3, 77, 90] and found[5] == 0
    args = (None, None, None, 0.0, None, 1.0, -100, [False] * 5, False, False)
    args += (None, None, 0)
    raw = linear_logprob_fwd(hidden.detach(), weight.detach(), target, *args)[0]
    assert torch.equal(raw.isnan(), found.isnan()) and raw[5] == 0
