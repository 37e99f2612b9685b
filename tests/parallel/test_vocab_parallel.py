"""A vocabulary split over two gloo processes equals one process: every head, every mode."""

import pytest
import torch

from dpo_fast.functional import linear_logprobs
from tests.parallel.launch import run_ranks
from tests.parallel.vocab_worker import CASES, KERNEL_CASES, ROWS, WIDTH


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocab")
    return run_ranks("tests.parallel.vocab_worker:vocab_cells", 2, folder)


@pytest.fixture(scope="module")
def kernel_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    target = "tests.parallel.vocab_worker:kernel_cells"
    return run_ranks(target, 2, folder, TRITON_INTERPRET="1")


def check(name, ranks, tolerance, gradient_tolerance):
    """Every rank's results against its own computation of the whole."""
    for rank in ranks:
        found, right = rank["cells"][name]["found"], rank["cells"][name]["right"]
        assert found.keys() == right.keys() and len(found) >= 6
        for key, value in found.items():
            expected = right[key]
            if key == "is_top1":
                assert torch.equal(value, expected)
                continue
            assert value.dtype == expected.dtype and value.shape == expected.shape
            finite = expected.isfinite()
            assert torch.equal(value[~finite], expected[~finite]), key
            expected = expected[finite].double()
            error = (value[finite].double() - expected).norm()
            allowed = gradient_tolerance if key.startswith("d ") else tolerance
            assert error <= allowed * (expected.norm() + 1e-3), key
    first, second = (rank["cells"][name]["found"] for rank in ranks)
    for key in ("logps", "loss", "ref_logps", "d hidden", "d lora_a"):
        if key in first:  # what is whole on every rank is the same bits on every rank
            assert torch.equal(first[key], second[key]), key


FUSED = ("fused None None", "fused min-memory None", "fused None 1536", "fused store 1")


@pytest.mark.parametrize("name", [*CASES, *FUSED])
def test_two_processes_equal_one(ranks, name):
    half = CASES.get(name, {}).get("dtype") == torch.bfloat16
    check(name, ranks, 2e-5, 8e-3 if half else 2e-5)


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_the_kernels_split_the_vocabulary_behind_the_same_interface(kernel_ranks, name):
    check(name, kernel_ranks, 2e-5, 5e-5)


def test_three_numbers_a_token_forward_and_dx_backward(ranks):
    """The CPU's path: a maximum, two sums; then the gradient of the hidden states."""
    for rank in ranks:
        assert rank["sizes"] == [ROWS, 2 * ROWS, ROWS * WIDTH]


def test_a_group_must_be_a_group():
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"group='tp' must be a VocabShard.*ProcessGroup"):
        linear_logprobs(hidden, weight, torch.zeros(3, dtype=torch.long), group="tp")


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_backends_of_whole_vocabularies_say_so(backend):
    from dpo_fast.backends import choose_sharded

    with pytest.raises(ValueError, match="split over processes: use backend='auto'"):
        choose_sharded(backend, "cpu", torch.float32)
