"""Scratch memory: lent once at a time, used again, bounded."""

from concurrent.futures import ThreadPoolExecutor

import torch

from dpo_fast.backends.scratch import BufferPool, as_matrix, padded

CPU = torch.device("cpu")


def test_a_returned_buffer_is_used_again():
    pool = BufferPool()
    with pool.borrow(1000, CPU) as first:
        address = first.data_ptr()
    with pool.borrow(500, CPU) as second:
        assert second.data_ptr() == address and second.numel() == 1000


def test_lent_memory_is_never_lent_again():
    pool = BufferPool()
    with pool.borrow(100, CPU) as one, pool.borrow(100, CPU) as two:
        assert one.data_ptr() != two.data_ptr()

    def use(value):
        with pool.borrow(4096, CPU) as mine:
            mine.fill_(value)
            return bool((mine == value).all())

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(use, range(200)))


def test_what_is_kept_is_bounded_and_can_be_released():
    pool = BufferPool(keep_bytes=1000)
    with pool.borrow(2000, CPU):
        pass
    assert pool.kept_bytes() == 0
    with pool.borrow(600, CPU), pool.borrow(300, CPU), pool.borrow(500, CPU):
        pass
    assert 0 < pool.kept_bytes() <= 1000
    pool.release()
    assert pool.kept_bytes() == 0


def test_rows_start_on_cache_lines():
    for dtype in (torch.float32, torch.float64):
        matrix = as_matrix(
            torch.empty(20 * padded(101, dtype) * 8, dtype=torch.uint8), 20, 101, dtype
        )
        assert matrix.shape == (20, 101) and matrix.stride(1) == 1
        assert matrix.stride(0) * dtype.itemsize % 64 == 0
