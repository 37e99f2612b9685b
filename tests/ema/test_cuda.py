"""The CUDA file without a GPU: it compiles cleanly, needs no spills, and its threads are right."""

import ctypes
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_fast.backends.ema import Draw, Entry, Table, blend_of
from dpo_fast.backends.ema.compiled import extension
from tests.ema.common import DTYPES, ROUNDINGS, assert_same_bits, make_plan, shadow_of, weights

CSRC = Path(__file__).parents[2] / "csrc"
THREADS = 128


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("nvcc: not on this machine")
    return found


@pytest.mark.parametrize("arch", ["80", "90"])
def test_compiles_without_warnings_or_spills(arch: str, tmp_path: Path) -> None:
    """At most 72 registers: seven blocks of 128 threads a multiprocessor hide the latency."""
    cubin = tmp_path / "ema.cubin"
    command = [nvcc(), "-O3", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
    command += [
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        str(CSRC / "ema.cu"),
        "-o",
        str(cubin),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", done.stderr)
    assert len(registers) == len(spills) == 2, done.stderr  # to nearest, and stochastic
    assert max(registers) <= 72
    assert all(value == "0" for row in spills for value in row), spills
    instructions = disassembly(cubin)
    assert "LDG.E.128" in instructions and "STG.E.128" in instructions  # 16-byte accesses
    assert not re.search(r"\bFFMA\b", instructions), "a fused multiply-add changes the bits"
    assert not re.search(r"\.FTZ\b", instructions), "subnormals are kept"


def disassembly(cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernel's code as a host function; a misaligned 16-byte access traps."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++: not on this machine")
    library = tmp_path_factory.mktemp("cuda_threads") / "run.so"
    source = Path(__file__).with_name("cuda_threads.cpp")
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-fno-strict-aliasing", f"-I{CSRC}"]
    flags += ["-fsanitize=alignment,bounds,shift", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    run = ctypes.CDLL(str(library)).run
    pointer, word = ctypes.c_void_p, ctypes.c_uint64
    run.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_float]
    run.argtypes += [ctypes.c_int] * 3 + [word, word, ctypes.c_int]
    run.restype = None
    return run


def run_threads(
    run: Any, entries: list[Entry], alpha: float, draw: Draw | None, threads: int = THREADS
) -> None:
    table, blend = Table.build(entries), blend_of(alpha)
    rows, _, chunks, num_chunks, chunk = table.arguments()
    seed, step = draw or (0, 0)
    scalars = (blend.weight, int(blend.from_policy), int(blend.copy), int(draw is not None))
    run(rows, chunks, num_chunks, chunk, *scalars, seed, step, threads)


SIZES = (1, 9, 2500, 40_009)
OFFSETS = (0, 5, 2**33 + 8, 12)


def misaligned(values: list[Tensor], by: int) -> list[Tensor]:
    """Copies that begin ``by`` elements into their storage."""
    return [torch.cat((v[:1].expand(by), v))[by:] if by else v.clone() for v in values]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_threads_give_the_cpu_s_bits(emulated: Any, dtype: torch.dtype, rounding: str) -> None:
    """Every mix of types, aligned and not, with infinities and NaNs among the weights."""
    draw = Draw(2**63 + 9, 2**34 + 7) if rounding == "stochastic" else None
    how = {"seed": 2**63 + 9, "step": 2**34 + 7, "rounding": rounding}
    for policy_dtype, shadowed, ref_skip in product(DTYPES, (False, True), (0, 1, 3)):
        start = [weights(n, dtype, spread=5) for n in SIZES]
        policies = [weights(n, policy_dtype, spread=5) for n in SIZES]
        for value, at in ((torch.inf, 700), (torch.nan, 1300), (-torch.inf, 2499)):
            policies[2][at] = value
            start[3][at] = value
        for alpha, policy_skip in ((0.01, ref_skip), (0.6, 0), (1.0, 1)):
            expected = [ref.clone() for ref in start]
            found = misaligned(start, ref_skip)
            moved = misaligned(policies, policy_skip)
            masters = shadow_of(expected) if shadowed else [None] * len(SIZES)
            copies = [m if m is None else m.clone() for m in masters]
            plan = make_plan(
                "scalar", expected, policies, shadow=masters if shadowed else None, offsets=OFFSETS
            )
            plan.update_(alpha, **how)  # type: ignore[arg-type]
            entries = [Entry(*e) for e in zip(found, moved, copies, OFFSETS, strict=True)]
            run_threads(emulated, entries, alpha, draw)
            about = (policy_dtype, shadowed, ref_skip, alpha)
            assert_same_bits(found, expected, about)
            masters_found = [m for m in copies if m is not None]
            assert_same_bits(masters_found, [m for m in masters if m is not None], about)


def test_threads_beyond_the_elements_and_few_threads(emulated: Any) -> None:
    for threads in (1, 3, 1024):
        ref, policy = weights(5000, torch.bfloat16), weights(5000, torch.bfloat16)
        expected = ref.clone()
        make_plan("scalar", [expected], [policy]).update_(0.2)
        run_threads(emulated, [Entry(ref, policy, None, 0)], 0.2, None, threads)
        assert_same_bits([ref], [expected])


def test_import_and_refusal_without_a_driver() -> None:
    """dpo_fast._C loads on a machine without a GPU; its CUDA entry then says what is missing."""
    module = extension()
    if isinstance(module, str):
        pytest.skip(f"dpo_fast._C: {module}")
    if not module.with_cuda:
        pytest.skip("dpo_fast._C: built without nvcc")
    if torch.cuda.is_available():
        pytest.skip("there is a driver on this machine")
    command = "from dpo_fast import _C; print(_C.ema_cuda_refusal(0))"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    assert "driver" in done.stdout
    entry = Entry(torch.zeros(8), torch.ones(8), None, 0)
    table = Table.build([entry]).arguments()
    with pytest.raises(RuntimeError, match=r"EMA kernel on CUDA device 0 failed: .*driver"):
        module.ema_cuda(*table, 0.1, False, False, False, 0, 0, device=0, stream=0)


def test_named_checks_of_the_entry_points() -> None:
    module = extension()
    if isinstance(module, str):
        pytest.skip(f"dpo_fast._C: {module}")
    ref, policy = torch.zeros(70_000), torch.ones(70_000)
    table = Table.build([Entry(ref, policy, None, 0)])
    rows, num_rows, chunks, num_chunks, chunk = table.arguments()
    module.ema_check_table(rows, num_rows, chunks, num_chunks, chunk)
    blend = (0.1, False, False, False, 0, 0)
    for arguments, message in (
        ((0, num_rows, chunks, num_chunks, chunk), "non-null"),
        ((rows, 0, chunks, num_chunks, chunk), "at least one row"),
        ((rows, num_rows, chunks, num_chunks, 12), "multiple of 8, got 12"),
        ((rows, num_rows, chunks, 2**31, chunk), "2147483648 chunks"),
    ):
        with pytest.raises(ValueError, match=message):
            module.ema_check_table(*arguments)
        with pytest.raises(ValueError, match=message):
            module.ema_cpu(*arguments, *blend, num_threads=1)
    with pytest.raises(ValueError, match="row 0 of the EMA table ends beyond"):
        module.ema_check_table(rows, num_rows, chunks, num_chunks - 1, chunk)
    with pytest.raises(ValueError, match="isa='neon'"):
        module.ema_cpu(*table.arguments(), *blend, num_threads=1, isa="neon")
    with pytest.raises(ValueError, match="num_threads"):
        module.ema_cpu(*table.arguments(), *blend, num_threads=0)
    for column, value, message in ((0, 0, "null address"), (3, 0, "0 elements"), (6, 9, "dtype")):
        broken = Table(table.rows.clone(), table.chunk_rows)
        broken.rows[0, column] = value
        with pytest.raises(ValueError, match=message):
            module.ema_check_table(*broken.arguments())
