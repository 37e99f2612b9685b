"""Compiles every shipped kernel for sm_90 and sm_80 without a GPU and checks what comes out.

    python -m dpo_fast_kernels.aot --target sm_90 sm_80 [--only TEXT] [--jobs 2]

For each kernel, variant and tile of the table: spilled bytes, registers, shared memory, and on
sm_90 the number of wgmma instructions, from `ptxas -v` and `cuobjdump` as Triton bundles them. The
exit status is 1 if a limit is broken. Works with triton 3.6 and 3.9.

The properties of a compiled kernel that load it (`n_regs`, `kernel[grid]`) are never touched: they
call the CUDA driver.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from dpo_fast_kernels.aot_cases import Case, shipped_cases

SHARED_LIMIT = {"sm_90": 227 * 1024, "sm_80": 99 * 1024}


class Report(NamedTuple):
    """What the assembler said about a case."""

    case: Case
    registers: int
    spills: int
    shared: int
    wgmma: int
    error: str | None

    def faults(self) -> list[str]:
        if self.error is not None:
            return [self.error]
        found = []
        if self.spills > self.case.spill_limit:
            found.append(f"{self.spills} B spilled, limit {self.case.spill_limit}")
        if self.shared > SHARED_LIMIT[self.case.target]:
            found.append(f"{self.shared} B shared, limit {SHARED_LIMIT[self.case.target]}")
        if self.case.wgmma and self.wgmma == 0:
            found.append("no wgmma instruction")
        return found


POINTER = {
    "x": "*bf16", "w": "*bf16", "tail_x": "*bf16", "tail_w": "*bf16", "e": "*bf16",
    "x_ptr": "*bf16", "w_ptr": "*bf16", "tail_x_ptr": "*bf16", "tail_w_ptr": "*bf16",
    "e_ptr": "*bf16", "target_ptr": "*i64", "col_ptr": "*i32",
    "rows_ptr": "*i32", "count_ptr": "*i32", "flag_ptr": "*i32", "table_ptr": "*bf16",
    "dx_ptr": "*bf16", "xs_ptr": "*bf16", "cu_ptr": "*i64", "E_DTYPE": "constexpr",
}  # fmt: skip
SCALARS = {
    "N": "i32", "V": "i32", "H": "i32", "Q": "i32", "K": "i32", "num_v": "i32", "start": "i32",
    "scale": "fp32", "softcap": "fp32", "offset": "fp32", "vocab_start": "i32",
    "vocab_total": "i32", "ignore_index": "i32", "num_units": "i32", "num_blocks": "i32",
    "width": "i32", "bound": "fp32",
}  # fmt: skip
UNIT_STRIDES = ("stride_xh", "stride_wh", "stride_tk")
ROWS = {"H", "stride_xn", "stride_wv"}  # odd where TMA cannot be used
UNALIGNED = {
    "N", "V", "num_v", "start", "vocab_start", "vocab_total", "ignore_index", "num_units",
    "num_blocks", "width",
}  # fmt: skip


def argument_type(name: str) -> str:
    """Type of a kernel argument by its name: the naming rule of this package."""
    if name in POINTER:
        return POINTER[name]
    if name in SCALARS:
        return SCALARS[name]
    if name.startswith("stride_"):
        return "i32"
    if name.endswith("_ptr"):
        return "*fp32"
    return "constexpr"


def compiler_source(case: Case) -> Any:
    """The case as the compiler takes it, specialised as the JIT would for a call on a GPU."""
    import triton.language as tl
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"dpo_fast_kernels.{case.module}"), case.kernel)
    names = kernel.arg_names
    constants = {k: (tl.bfloat16 if v == "bf16" else v) for k, v in case.constants.items()}
    constants |= {n: 1 for n in UNIT_STRIDES if n in names}
    signature = {}
    for name in names:
        given = case.signature.get(name, argument_type(name))
        signature[name] = "constexpr" if name in constants else given
    missing = [n for n in names if signature[n] == "constexpr" and n not in constants]
    assert not missing, f"{case.kernel}: no value for {missing}"
    odd = UNALIGNED if case.aligned else UNALIGNED | ROWS
    aligned = [
        n for n in names if signature[n].startswith("*") or (signature[n] == "i32" and n not in odd)
    ]
    return ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )


def compile_case(case: Case) -> Report:
    """Compile one case and read the assembler's report; runs in a process of its own."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", int(case.target.removeprefix("sm_")), 32)
    options = {
        "num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": False,
    }  # fmt: skip
    source = compiler_source(case)
    with quiet_stderr() as log:
        try:
            compiled = triton.compile(source, target=target, options=options)
        except Exception as error:  # whatever the compiler raises is this case's result
            return Report(case, -1, -1, -1, 0, f"{type(error).__name__}: {error}"[:300] + log())
    registers, spills = assembler_report(compiled.asm["ptx"], case.target)
    wgmma = len(re.findall(r"wgmma\.mma_async", compiled.asm["ptx"]))
    return Report(case, registers, spills, compiled.metadata.shared, wgmma, None)


class quiet_stderr:
    """The compiler writes its passes to descriptor 2 when it fails; keep the last line only."""

    def __enter__(self) -> Any:
        self.file = tempfile.TemporaryFile(mode="w+")
        self.saved = os.dup(2)
        os.dup2(self.file.fileno(), 2)
        return self.tail

    def tail(self) -> str:
        self.file.seek(0)
        lines = [line for line in self.file.read().splitlines() if "error" in line]
        return " | ".join(lines[:2])

    def __exit__(self, *_: object) -> None:
        os.dup2(self.saved, 2)
        os.close(self.saved)
        self.file.close()


def assembler_report(ptx: str, target: str) -> tuple[int, int]:
    """(registers, spilled bytes) of a kernel, from `ptxas -v`."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    name = "sm_90a" if target == "sm_90" else target
    said = ""
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "kernel.ptx"
        path.write_text(ptx)
        for tool in ("ptxas", "ptxas-blackwell"):  # the older one may not know the PTX version
            command = [str(folder / tool), "-v", f"--gpu-name={name}", str(path), "-o", os.devnull]
            done = subprocess.run(command, capture_output=True, text=True)
            said = done.stderr
            if done.returncode == 0:
                break
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    if spills is None or registers is None:
        raise RuntimeError(f"ptxas said: {said[-300:]}")
    return int(registers.group(1)), max(map(int, spills.groups()))


def compile_all(cases: list[Case], jobs: int) -> Iterator[Report]:
    """Reports in the order of the cases."""
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="dpo-fast-aot-"))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_case, cases)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", nargs="+", default=["sm_90", "sm_80"], choices=SHARED_LIMIT)
    parser.add_argument("--only", default="", help="a part of the label")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(argv)
    import triton

    print(f"triton {triton.__version__}")
    print(f"{'target':6s} {'kernel':46s} {'regs':>4s} {'spill B':>7s} {'shared':>7s} {'wgmma':>5s}")
    cases = [c for t in options.target for c in shipped_cases(t) if options.only in c.label]
    broken = 0
    for r in compile_all(cases, options.jobs):
        row = f"{r.case.target:6s} {r.case.label:46s} {r.registers:4d} {r.spills:7d}"
        row += f" {r.shared:7d} {r.wgmma:5d}"
        faults = r.faults()
        broken += bool(faults)
        print(row + ("  FAILED: " + "; ".join(faults) if faults else ""), flush=True)
    print(f"{len(cases)} kernels, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
