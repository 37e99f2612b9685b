"""Run by test_triton.py in a process of its own: the kernel compiled for a GPU that is not there.

Prints one JSON object a variant: registers, spilled bytes, what the PTX contains.
"""

import json
import os
import re
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernel is defined
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="dpo-fast-ema-")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpo_fast_kernels import ema
from dpo_fast_kernels.aot import assembler_report

F32, BF16, F16 = 0, 1, 2
SCALARS = {"weight": "fp32", "seed_lo": "i32", "seed_hi": "i32", "step_lo": "i32", "step_hi": "i32"}
POINTERS = {"rows_ptr": "*i64", "chunk_rows_ptr": "*i32", "variants_ptr": "*i32"}


def variant(ref: int, policy: int, shadow: bool, aligned: bool = True, phased: bool = False) -> int:
    address = 16 if aligned else 18
    row = [address, address, address if shadow else 0, 1, int(phased), 0, ref, policy]
    return 1 << ema.variant_code(row)


VARIANTS = {
    "bf16 bf16": variant(BF16, BF16, False),
    "bf16 bf16 shadow": variant(BF16, BF16, True),
    "fp32 fp32": variant(F32, F32, False),
    "fp16 fp16": variant(F16, F16, False),
    "unaligned": variant(BF16, BF16, False, aligned=False, phased=True),
    "mixed": variant(BF16, BF16, False) | variant(F32, F32, False) | variant(BF16, F32, True),
}


def compile_variant(arch: int, mask: int, stochastic: bool) -> dict[str, object]:
    names = ema._ema_kernel.arg_names
    constants = {
        "VARIANTS": mask, "FROM_POLICY": False, "COPY": False, "STOCHASTIC": stochastic,
        "CHUNK": 32768, "BLOCK": ema.BLOCK,
    }  # fmt: skip
    source = ASTSource(
        fn=ema._ema_kernel,
        signature={n: {**SCALARS, **POINTERS}.get(n, "constexpr") for n in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS},
    )
    options = {"num_warps": ema.NUM_WARPS, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spills = assembler_report(ptx, f"sm_{arch}")
    return {
        "registers": registers,
        "spills": spills,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v[24]", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v[24]", ptx)),
        "fused": len(re.findall(r"\bfma\.", ptx)),
        "flushing": len(re.findall(r"\.ftz", ptx)),
    }


def main() -> None:
    arch = int(sys.argv[1])
    for name, mask in VARIANTS.items():
        for stochastic in (True,) if name in ("mixed", "unaligned") else (False, True):
            report = compile_variant(arch, mask, stochastic)
            print(json.dumps({"name": name, "stochastic": stochastic, **report}), flush=True)


if __name__ == "__main__":
    main()
