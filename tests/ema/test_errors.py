"""Bad input: each error names what is wrong, the rule, and what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_fast.functional.ema import EmaPlan, ema_, make_shadow


def pair(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(shape or (4, 3)).to(dtype)], [torch.randn(shape or (4, 3)).to(dtype)]


def wrong(**changes: Any) -> Callable[[], None]:
    """A call that is right but for the changes."""
    refs, policies = pair()
    arguments: dict[str, Any] = {"refs": refs, "policies": policies, "alpha": 0.1} | changes
    return lambda: ema_(**arguments)


A, B = torch.randn(4, 3), torch.randn(4, 3)
META = torch.empty(4, 3, device="meta")
SPARSE = torch.eye(3).to_sparse()
STORAGE = torch.randn(100)
TIED = torch.randn(4, 3)


CASES: dict[str, tuple[Callable[[], None], type[Exception], str]] = {
    "fewer policies": (
        wrong(refs=[A, B, B + 1], policies=[A + 1, B + 1]),
        ValueError,
        r"refs has 3 tensors and policies 2: refs\[2\] \(\[4, 3\] torch.float32 on cpu\) is the",
    ),
    "fewer refs": (
        wrong(refs={"a": A}, policies={"a": B, "lm_head": TIED}),
        ValueError,
        r"policies\['lm_head'\] .* is the first without a partner",
    ),
    "other names": (
        wrong(refs={"a": A, "b": B}, policies={"a": A + 1, "c": B + 1}),
        ValueError,
        "differ first at position 1: 'b' in refs, 'c' in policies",
    ),
    "shapes": (wrong(refs=[A], policies=[B.T]), ValueError, r"refs\[0\] .* differ in shape"),
    "one tensor": (wrong(refs=A), TypeError, "refs is one tensor; pass a list"),
    "not a tensor": (wrong(policies=[1.0]), TypeError, r"policies\[0\] is float"),
    "alpha above": (wrong(alpha=1.5), ValueError, r"alpha = 1.5 is outside \[0, 1\]"),
    "alpha below": (wrong(alpha=-1e-9), ValueError, "outside"),
    "alpha nan": (wrong(alpha=float("nan")), ValueError, "outside"),
    "alpha text": (wrong(alpha="0.5"), TypeError, "alpha is '0.5'"),
    "alpha bool": (wrong(alpha=True), TypeError, "alpha is True"),
    "meta ref": (wrong(refs=[META], policies=[A]), ValueError, r"refs\[0\] is on the meta device"),
    "meta policy": (wrong(refs=[A], policies=[META]), ValueError, "materialise"),
    "sparse": (wrong(refs=[SPARSE], policies=[SPARSE]), ValueError, "sparse.*to_dense"),
    "integers": (
        wrong(refs=[A.long()], policies=[B.long()]),
        TypeError,
        r"refs\[0\] has dtype torch.int64; only .* ref.copy_\(policy\)",
    ),
    "complex": (
        wrong(refs=[A.to(torch.complex64)], policies=[B]),
        TypeError,
        "complex64",
    ),
    "float8": (
        wrong(refs=[A.to(torch.float8_e4m3fn)], policies=[B]),
        TypeError,
        "float8_e4m3fn",
    ),
    "negated view": (
        wrong(refs=[A], policies=[torch.randn(4, 3, dtype=torch.cfloat).conj().imag]),
        ValueError,
        "resolve_neg",
    ),
    "expanded ref": (
        wrong(refs=[torch.randn(3).expand(4, 3)], policies=[A]),
        ValueError,
        r"refs\[0\] is expanded",
    ),
    "inference ref": (
        wrong(refs=[torch.inference_mode()(torch.randn)(4, 3)], policies=[A]),
        ValueError,
        "inference mode",
    ),
    "same tensor": (
        wrong(refs=[A], policies=[A]),
        ValueError,
        r"refs\[0\] and policies\[0\] share",
    ),
    "overlap": (
        wrong(refs=[STORAGE[:60]], policies=[STORAGE[40:]]),
        ValueError,
        r"refs\[0\] and policies\[0\] share memory; the reference needs storage of its own",
    ),
    "tied ref twice": (
        wrong(refs=[TIED, B, TIED], policies=[A, A + 1, A + 2]),
        ValueError,
        r"refs\[0\] and refs\[2\] share memory.*tied weight is passed once",
    ),
    "rounding": (wrong(rounding="shadow"), ValueError, "rounding='shadow' is unknown"),
    "seed": (wrong(seed=-1), ValueError, "seed = -1"),
    "step": (wrong(step=2**64), ValueError, "step = 18446744073709551616"),
    "step fraction": (wrong(step=0.5), TypeError, "float"),
    "offsets": (wrong(offsets=[0, 1]), ValueError, "offsets has 2 entries and refs 1"),
    "offset negative": (wrong(offsets=[-8]), ValueError, r"offsets\[0\] = -8"),
    "offset huge": (wrong(offsets=[2**63 - 4]), ValueError, "63"),
    "shadow length": (wrong(shadow=[]), ValueError, "shadow has 0 entries and refs 1"),
    "shadow missing": (wrong(shadow=[None]), ValueError, r"shadow\[0\] is None and refs\[0\]"),
    "shadow dtype": (wrong(shadow=[A.double()]), TypeError, r"shadow\[0\] has dtype torch.float64"),
    "shadow shape": (wrong(shadow=[A.T]), ValueError, r"shadow\[0\] .* must have the shape"),
    "shadow of float64": (
        wrong(refs=[A.double()], policies=[B], shadow=[A]),
        TypeError,
        "a float64 reference takes None",
    ),
    "shadow is the ref": (wrong(refs=[A], policies=[B], shadow=[A]), ValueError, "share memory"),
    "backend": (wrong(backend="cuda"), ValueError, "backend='cuda' is unknown; use one of 'auto'"),
}


@pytest.mark.parametrize("name", CASES)
def test_errors(name: str) -> None:
    call, kind, message = CASES[name]
    with pytest.raises(kind, match=message):
        call()


def test_overlap_is_found_wherever_it_lies() -> None:
    """A long read that begins before, and one that ended before, the tensor written."""
    arena = torch.randn(1000)
    with pytest.raises(ValueError, match=r"policies\[1\] and refs\[0\] share memory"):
        EmaPlan([arena[500:510], torch.zeros(800)], [torch.zeros(10), arena[100:900]])
    with pytest.raises(ValueError, match="share memory"):
        EmaPlan([arena[0:900:2], arena[901:]], [torch.zeros(450), arena[1:100]])
    EmaPlan([arena[500:510], arena[510:520]], [arena[:10], arena[0:10]])  # reads may overlap


def test_nothing_is_written_before_all_is_checked() -> None:
    refs, policies = [A.clone(), B.clone()], [B.clone(), B.clone().T]
    before = [ref.clone() for ref in refs]
    with pytest.raises(ValueError, match="shape"):
        ema_(refs, policies, 0.5)
    assert all(torch.equal(ref, old) for ref, old in zip(refs, before, strict=True))


def test_backends_asked_for_by_name_say_why_they_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dpo_fast.backends.ema import choose

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choose.cache_clear()
    with pytest.raises(
        ValueError, match="backend='triton' cannot run: the Triton kernel runs on CUDA"
    ):
        choose("triton", torch.device("cpu"))
    with pytest.raises(
        ValueError, match="backend='compiled' cannot run: the compiled kernels run on"
    ):
        choose("compiled", torch.device("mps"))
    choose.cache_clear()


def test_shadow_errors_name_the_remedy() -> None:
    refs, policies = pair()
    with pytest.raises(ValueError, match="make_shadow"):
        EmaPlan(refs, policies, shadow=[None])
    EmaPlan(refs, policies, shadow=make_shadow(refs))
