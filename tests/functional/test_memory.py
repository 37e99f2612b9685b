"""Nothing [N, V]-sized beyond the workspace; nothing kept or computed that nobody asked for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dpo_fast.backends import buffer_bytes, cpu_refusal
from dpo_fast.backends.scratch import scratch
from dpo_fast.chunked import chunks
from dpo_fast.functional import fused_linear_dpo, linear_logprobs
from tests.functional.cases import SigmoidLoss, borders, make_case, workspace_of

N, H, V = 256, 16, 2048
GEMM = 2 * N * H * V
ROW = 4 * V


class Gemms(FlopCounterMode):
    """Counts products in units of one GEMM; torch leaves the in-place ones out."""

    def __init__(self):
        shape = lambda acc, a, b, **_: 2 * a[0] * a[1] * b[1]
        super().__init__(display=False, custom_mapping={torch.ops.aten.addmm_: shape})

    def count(self):
        return self.get_total_flops() / GEMM


class LargestAllocation(TorchDispatchMode):
    """Bytes of the largest storage that any operation returned."""

    def __init__(self, known=()):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, tuple | list) else (found,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.bytes = max(self.bytes, storage.nbytes())
        return found


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 16 rows, and no scratch left over from other tests."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 16 * ROW)
    monkeypatch.setattr(chunks, "MIN_ROWS", 16)
    scratch.release()


def case_of(**kwargs):
    return make_case(N, H, V, **kwargs)


def fused(case, backend="chunked", **options):
    cu = borders([N // 8] * 8)
    return fused_linear_dpo(
        case.hidden,
        case.weight,
        case.target,
        cu,
        ref_hidden=case.hidden.detach(),
        ref_weight=case.weight.detach(),
        loss=SigmoidLoss(),
        backend=backend,
        **options,
    )


def linear(case, backend="chunked", **options):
    return linear_logprobs(case.hidden, case.weight, case.target, backend=backend, **options)


@pytest.mark.parametrize(
    ("op", "options", "limit"),
    [
        (linear, {"mode": "min-memory"}, 16 * ROW),
        (linear, {"workspace": 0}, 16 * ROW),
        (fused, {"mode": "min-memory"}, 16 * ROW),
        (fused, {"workspace": 64 * ROW}, buffer_bytes(64, ROW)),
    ],
)
def test_no_allocation_beyond_the_workspace(op, options, limit):
    case = case_of()
    with LargestAllocation(known=(case.hidden, case.weight)) as seen:
        out = op(case, **options)
        (out if op is linear else out.loss).sum().backward()
    assert limit <= seen.bytes <= max(limit, V * H * 4) < N * ROW


@pytest.mark.parametrize("op", [linear, fused])
def test_frozen_head_and_evaluation_use_one_chunk(op):
    case = case_of(requires_grad=("hidden",))
    with LargestAllocation(known=(case.hidden, case.weight)) as seen:
        out = op(case)
        (out if op is linear else out.loss).sum().backward()
        with torch.no_grad():
            op(case)
    assert seen.bytes == 16 * ROW


@pytest.mark.skipif(cpu_refusal("cpu", torch.float32) is not None, reason="no compiled head")
@pytest.mark.parametrize("op", [linear, fused])
def test_the_compiled_head_keeps_to_the_workspace(op):
    case = case_of()
    row = workspace_of(1, "cpu", V)
    plans = [({"mode": "min-memory"}, N * ROW / 2)]
    if op is fused:
        plans.append(({"workspace": 64 * row}, buffer_bytes(64, row)))
    for options, limit in plans:
        scratch.release()
        with LargestAllocation(known=(case.hidden, case.weight)) as seen:
            out = op(case, backend="cpu", **options)
            (out if op is linear else out.loss).sum().backward()
        assert 16 * row < seen.bytes <= limit < N * ROW


FLOPS = {
    # (trained, online reference) -> GEMMs
    "trained, kept": (("hidden", "weight"), {}, 3),
    "trained, recomputed": (("hidden", "weight"), {"mode": "min-memory"}, 4),
    "frozen head": (("hidden",), {}, 2),
    "frozen head, no workspace": (("hidden",), {"workspace": 0, "mode": "min-memory"}, 2),
    "head only": (("weight",), {}, 2),
    "nothing": ((), {}, 1),
}


@pytest.mark.parametrize("name", FLOPS)
def test_number_of_gemms(name):
    wanted, options, gemms = FLOPS[name]
    case = case_of(requires_grad=wanted)
    for op, extra in ((linear, 0), (fused, 1)):
        with Gemms() as gemm:
            out = op(case, **options)
            value = (out if op is linear else out.loss).sum()
            if value.requires_grad:
                value.backward()
        assert gemm.count() == gemms + extra, op


def test_groups_of_a_separable_loss_add_no_gemm():
    case = case_of()
    with Gemms() as gemm:
        fused(case, workspace=64 * ROW).loss.backward()
    assert gemm.count() == 4


def test_a_pair_too_long_for_the_workspace_is_recomputed_by_itself():
    """One of two pairs exceeds it: half of a GEMM more, and nothing larger than the workspace."""
    case = case_of()
    cu = borders([N // 16, N * 7 // 16, N // 16, N * 7 // 16])
    with Gemms() as gemm, LargestAllocation(known=(case.hidden, case.weight)) as seen:
        fused_linear_dpo(
            case.hidden, case.weight, case.target, cu, ref_logps=torch.zeros(4),
            loss=SigmoidLoss(), backend="chunked", workspace=48 * ROW,
        ).loss.backward()  # fmt: skip
    assert gemm.count() == 3 + 7 / 8
    assert seen.bytes <= max(buffer_bytes(48, ROW), V * H * 4)


def test_no_grad_is_one_gemm_even_if_the_inputs_require_gradients():
    case = case_of()
    with torch.no_grad(), Gemms() as gemm:
        linear(case)
    assert gemm.count() == 1


def test_gradient_of_the_head_is_not_copied_in_the_last_backward():
    case = case_of()
    out = fused(case)
    # Not held on to: autograd copies a gradient that somebody else refers to.
    seen = LargestAllocation(t for t in out.loss.grad_fn.saved_tensors if t is not None)
    with seen:
        (out.loss * 0.5).backward()
    assert seen.bytes < V * H * 4
