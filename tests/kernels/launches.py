"""Run by test_aot.py in a process of its own: what a GPU would be asked to launch, without one.

Triton's own launch path runs up to the compiler: binding of arguments, specialisation, options,
tensor descriptors. The driver is a stand-in, and what would be compiled is recorded and held
against the cases of ``dpo_fast_kernels.aot``. Prints one JSON object for each architecture.

    python -m tests.kernels.launches [--compile]      # --compile: each recorded launch, for real
"""

import json
import os
import sys
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dpo_fast_kernels import aot, operands
from dpo_fast_kernels.ops import Flat, run_backward, run_forward
from dpo_fast_kernels.problem import Gradients
from dpo_fast_kernels.segment import segment_sum

CAPABILITIES = {"sm_90": (9, 0), "sm_80": (8, 0)}
EXACT = {
    "_exp_gemm_kernel",
    "_kept_product_kernel",
}  # every variant that is launched is compiled; else the blocks


class NoDriver:
    """What the launch path asks a driver before it has compiled."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)

    def get_current_device(self) -> int:
        return self.target.arch  # so that no launch is cached for another architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Launch(SimpleNamespace):
    """One kernel as it would be compiled."""

    kernel: str
    constants: dict[str, Any]  # constexprs by name, None included
    signature: dict[str, str]
    aligned: set[str]
    num_warps: int
    num_stages: int


def recorded(capability: tuple[int, int]) -> tuple[list[Launch], Any]:
    """An empty record, and the context in which launches are written to it."""
    launches: list[Launch] = []

    def do_compile(self, key, signature, device, constexprs, options, attrs, warmup):  # type: ignore[no-untyped-def]
        names = list(signature)
        found = Launch(
            kernel=self.fn.__name__,
            constants={names[path[0]]: value for path, value in constexprs.items()},
            signature={k: v.replace(", ", ",") for k, v in signature.items()},  # [128, 64]
            aligned={names[p[0]] for p, a in attrs.items() if ["tt.divisibility", 16] in a},
            num_warps=options.num_warps,
            num_stages=options.num_stages,
        )
        assert options.enable_fp_fusion is False or self.fn.__name__ in (
            "_compact_kernel",
            "_target_fix_kernel",
        )
        found.source = (self, signature, constexprs, attrs, options)
        launches.append(found)
        return SimpleNamespace(
            launch_metadata=lambda *_: None, run=lambda *_: None, function=None,
            packed_metadata=None,
        )  # fmt: skip

    stack = mock.patch.multiple(JITFunction, _do_compile=do_compile)
    return launches, stack


def problems() -> Iterator[dict[str, Any]]:
    """Calls of the head: features, modes, alignment."""
    modes = ("store", "again", "frozen", "none", "filtered", "filtered, added")
    for width, tail, cap, stats, mode in product(
        (128, 127), (False, True), (None, 30.0), (False, True), modes
    ):
        yield {"width": width, "tail": tail, "cap": cap, "stats": stats, "mode": mode}


def call(width: int, tail: bool, cap: float | None, stats: bool, mode: str, engine: str) -> None:
    """Forward and backward; every kernel is a no-op, so the values mean nothing."""
    n, vocab = 200, 1003
    normal = lambda *shape: torch.randn(*shape).bfloat16()
    x, w = normal(n, width), normal(vocab, width)
    target = torch.randint(vocab, (n,))
    filtered = mode.startswith("filtered")
    if filtered and (engine != "triton" or tail):
        return
    bias, a, b = (normal(vocab), normal(8, width), normal(vocab, 8)) if tail else (None,) * 3
    trained = mode in ("store", "again") or filtered
    wanted = [mode != "none", trained, trained and tail, trained and tail, trained and tail]
    head = (0.5, cap, 1.0)
    store, bound = mode == "store" or filtered, 1e-4 if filtered else None
    flat = run_forward(x, w, target, bias, a, b, *head, -100, wanted, stats, store, engine, bound)
    if mode != "none":
        saved, into = Flat(*flat), None
        if mode == "filtered, added":
            into = Gradients(weight=torch.zeros(vocab, width))
        upstream = torch.randn(n)
        run_backward(x, w, bias, a, b, *head, wanted, engine, saved, upstream, into=into)


def constants_of(case: aot.Case) -> dict[str, Any]:
    return {k: (tl.bfloat16 if v == "bf16" else v) for k, v in case.constants.items()}


def faults(launches: list[Launch], target: str) -> list[str]:
    """Launches that no case of aot.py stands for."""
    cases = aot.shipped_cases(target)
    found = []
    for launch in launches:
        same = [c for c in cases if c.kernel == launch.kernel]
        if not same:
            found.append(f"{launch.kernel} is launched and never compiled")
            continue
        blocks = lambda constants: {k: v for k, v in constants.items() if k.startswith("BLOCK")}
        fits = [c for c in same if blocks(constants_of(c)) == blocks(launch.constants)]
        if launch.kernel in EXACT:
            units = {n: 1 for n in aot.UNIT_STRIDES if launch.constants.get(n) == 1}
            flags = {k: v for k, v in launch.constants.items() if k not in ("E_DTYPE",)}
            fits = [
                c
                for c in fits
                if {k: v for k, v in (constants_of(c) | units).items() if k != "E_DTYPE"} == flags
            ]
        fits = [c for c in fits if (c.num_warps, c.num_stages) == launched_with(launch, c)]
        if not fits:
            found.append(f"{launch.kernel} {launch.constants} {launch.num_warps} warps "
                         f"{launch.num_stages} stages")  # fmt: skip
            continue
        if launch.kernel in EXACT:
            types = [aot.compiler_source(c).signature for c in fits]
            if launch.signature not in types:
                odd = {k: v for k, v in launch.signature.items() if v != types[0][k]}
                found.append(f"{launch.kernel}: types {odd}, compiled {types[0]}")
    return found


def launched_with(launch: Launch, case: aot.Case) -> tuple[int, int]:
    """Warps and stages; the row kernels have no loop that stages could matter to."""
    stages = launch.num_stages if launch.kernel in EXACT else case.num_stages
    return launch.num_warps, stages


def compile_all(launches: list[Launch], target: GPUTarget) -> list[str]:
    import triton
    from triton.compiler import ASTSource

    bad = []
    for launch in launches:
        fn, signature, constexprs, attrs, options = launch.source
        try:
            triton.compile(
                ASTSource(fn, signature, constexprs, attrs), target=target, options=options.__dict__
            )
        except Exception as error:  # whatever the compiler raises is the finding
            bad.append(f"{launch.kernel} {launch.constants}: {type(error).__name__}: {error}")
    return bad


def run(target: str, compiled: bool) -> dict[str, Any]:
    capability = CAPABILITIES[target]
    launches, recording = recorded(capability)
    stand_in = NoDriver(capability)
    with (
        recording,
        mock.patch.object(operands, "capability_of", lambda x: capability),
        mock.patch("dpo_fast_kernels.kept_tiles.capability_of", lambda x: capability),
        mock.patch("dpo_fast_kernels.kept_product.capability_of", lambda x: capability),
        mock.patch("dpo_fast_kernels.operands.num_programs", lambda x: 132),
        mock.patch("dpo_fast_kernels.engine.num_programs", lambda x: 132),
    ):
        driver.set_active(stand_in)
        for engine, options in product(("triton", "cublas"), problems()):
            call(**options, engine=engine)
        segment_sum(torch.randn(40), torch.tensor([0, 7, 40]))
    found = {"launches": len(launches), "faults": faults(launches, target)}
    found["kernels"] = sorted({launch.kernel for launch in launches})
    if compiled:
        found["compiler"] = compile_all(launches, stand_in.target)
    return found


def main() -> None:
    torch.manual_seed(0)
    for target in CAPABILITIES:
        print(json.dumps({"target": target, **run(target, "--compile" in sys.argv)}), flush=True)


if __name__ == "__main__":
    main()
