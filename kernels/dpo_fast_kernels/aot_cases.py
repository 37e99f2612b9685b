"""What aot.py compiles: every shipped kernel in every variant, tile and target that is launched."""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from dpo_fast_kernels.kept_product import KEPT_TILES, KeptTile
from dpo_fast_kernels.kept_tiles import ROWS as KEPT_ROWS
from dpo_fast_kernels.tiles import OFF_RANGE_BLOCK_N, Row, Tile, table, variant_of

SPILLS_HEAVIEST = 128  # bytes a thread, softcap together with statistics; everything else: none
SPILLS_UNALIGNED = 4096  # odd rows are loaded element by element, with an address each: not fast


class Case(NamedTuple):
    """One kernel as it is shipped for one target."""

    target: str
    label: str
    module: str
    kernel: str
    signature: dict[str, str]  # types of the arguments that are not constexpr
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    wgmma: bool  # must use the matrix units of sm_90
    spill_limit: int
    aligned: bool = True  # rows of x and w lie on 16-byte borders


def variants() -> Iterator[tuple[str, dict[str, bool]]]:
    """Feature sets of the GEMM kernels: Tail (adapter, bias), softCap, Statistics."""
    for text in ("", "T", "C", "TC", "S", "TS", "CS", "TCS"):
        yield (
            text or "-",
            {"HAS_TAIL": "T" in text, "HAS_SOFTCAP": "C" in text, "STATS": "S" in text},
        )


def tile_rows(target: str) -> list[Row]:
    """Rows of the shipped table for a target, those without TMA included."""
    return [row for row in table().tiles if row.arch.removesuffix("-pointer") == target]


def gemm_cases(target: str) -> Iterator[Case]:
    """Every tile with every set of features that takes it, each once."""
    seen = set()
    for row in tile_rows(target):
        for text, on in variants():
            if row.variant != variant_of(on["HAS_SOFTCAP"], on["STATS"]):
                continue
            for store in (False, True):
                case = exp_gemm_case(row.arch, row.value, text, on, store)
                if (case.label, case.aligned) not in seen:
                    seen.add((case.label, case.aligned))
                    yield case


def exp_gemm_case(arch: str, tile: Tile, text: str, on: dict[str, bool], store: bool) -> Case:
    target, tma = arch.removesuffix("-pointer"), arch == "sm_90"
    limit = SPILLS_HEAVIEST if on["HAS_SOFTCAP"] and on["STATS"] else 0
    if arch == "sm_90-pointer":
        limit = SPILLS_UNALIGNED
    constants: dict[str, Any] = {
        "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_H": tile.block_h,
        "BLOCK_Q": tile.block_q, "GROUP_N": tile.group_n, "UNIT": tile.unit, "TMA": tma,
        "STORE": store, "HAS_LOST": store, "E_DTYPE": "bf16", "FLATTEN": tile.flatten, **on,
    }  # fmt: skip
    types = {}
    if tma:
        shapes = {"x": (tile.block_n, tile.block_h), "w": (tile.block_v, tile.block_h)}
        shapes |= {"tail_x": (tile.block_n, tile.block_q), "tail_w": (tile.block_v, tile.block_q)}
        shapes["e"] = (tile.block_n, tile.block_v)
        types = {name: f"tensordesc<bf16[{a},{b}]>" for name, (a, b) in shapes.items()}
    unused = [("e", not store), ("lost_ptr", not store)]
    unused += [("tail_x", not on["HAS_TAIL"]), ("tail_w", not on["HAS_TAIL"])]
    constants |= {name: None for name, gone in unused if gone}
    label = (
        f"exp_gemm {'tma' if tma else 'ptr'} {tile.block_n}x{tile.block_v}x{tile.block_h} "
        f"w{tile.num_warps} s{tile.num_stages}{' flat' * tile.flatten} {text}{' store' * store}"
    )
    return Case(
        target, label, "exp_gemm", "_exp_gemm_kernel", types, constants,
        tile.num_warps, tile.num_stages, target == "sm_90", limit, arch != "sm_90-pointer",
    )  # fmt: skip


def off_range_cases(target: str) -> Iterator[Case]:
    """The blocks of the table's tiles, the lightest and the heaviest features."""
    blocks = {(r.value.block_v, r.value.block_h, r.value.block_q) for r in tile_rows(target)}
    for (width, block_h, block_q), (text, on) in product(sorted(blocks), variants()):
        if text not in ("-", "TC", "TCS"):
            continue
        for maximum, store in ((True, False), (False, True)):
            constants: dict[str, Any] = {
                "BLOCK_N": OFF_RANGE_BLOCK_N, "BLOCK_V": width, "BLOCK_H": block_h,
                "BLOCK_Q": block_q, "MAXIMUM": maximum, "STORE": store, "HAS_LOST": store, **on,
            }  # fmt: skip
            constants |= without_tail(on)
            if not store:
                constants |= {"e_ptr": None, "lost_ptr": None}
            label = f"off_range 16x{width}x{block_h} q{block_q} {text} {'max' * maximum}"
            yield Case(
                target, label, "off_range", "_off_range_kernel", {}, constants,
                max(4, width // 32), 2, False, 0,
            )  # fmt: skip


def without_tail(on: dict[str, bool]) -> dict[str, None]:
    return {} if on["HAS_TAIL"] else {"tail_x_ptr": None, "tail_w_ptr": None}


def target_logit_cases(target: str) -> Iterator[Case]:
    blocks = {(r.value.block_h, r.value.block_q) for r in tile_rows(target)}
    for (block_h, block_q), (text, on) in product(sorted(blocks), variants()):
        if text not in ("-", "TC"):
            continue
        constants: dict[str, Any] = {"BLOCK_H": block_h, "BLOCK_Q": block_q, "BLOCK": 64, **on}
        del constants["STATS"]
        constants |= without_tail(on)
        label = f"target_logit {block_h} q{block_q} {text}"
        yield Case(
            target, label, "target_logit", "_target_logit_kernel", {}, constants, 4, 3,
            target == "sm_90", 0,
        )  # fmt: skip


def row_cases(target: str) -> Iterator[Case]:
    """The per-row kernels, in their largest variants."""

    def case(module: str, kernel: str, warps: int = 4, **constants: Any) -> Case:
        return Case(target, kernel, module, kernel, {}, constants, warps, 3, False, 0)

    for maximum in (False, True):
        yield case(
            "rows",
            "_reduce_tiles_kernel",
            8,
            BLOCK_N=32,
            BLOCK_T=256,
            MAXIMUM=maximum,
            INDIRECT=True,
        )
    for redo in (False, True):
        gone: dict[str, Any] = {} if redo else {"rows_ptr": None, "count_ptr": None}
        yield case(
            "rows", "_finish_rows_kernel", BLOCK=128, E_DTYPE="bf16", STATS=True, STORE=True,
            HAS_LOST=True,            FROM_K=redo, INDIRECT=redo, **gone,
        )  # fmt: skip
    yield case("rows", "_compact_kernel", warps=8, BLOCK=4096)
    yield case("row_scale", "_gather_axpy_kernel", BLOCK_N=16, BLOCK_K=128)
    yield case(
        "row_scale", "_row_scale_kernel", BLOCK_N=16, BLOCK_H=128, NEED_DX=True, NEED_XS=True,
        HAS_UNIT=True,
    )  # fmt: skip
    yield case("row_scale", "_column_sum_kernel", BLOCK_N=32, BLOCK_V=128)
    yield case("row_scale", "_target_fix_kernel", BLOCK=256)
    yield case("logits", "_logits_max_kernel", warps=8, BLOCK=4096, HAS_SOFTCAP=True)
    yield case(
        "logits", "_logits_exp_kernel", warps=8, BLOCK=4096, SUMS=True, STATS=True, STORE=True,
        HAS_LOST=True, HAS_SOFTCAP=True,
    )  # fmt: skip
    yield case("segment", "_segment_sum_kernel", BLOCK=512)


def kept_product_cases(target: str) -> Iterator[Case]:
    """The filtered mode's two GEMMs: E W, and E^T X rounded and added."""
    for arch, tile in KEPT_TILES.items():
        if arch.removesuffix("-pointer") != target:
            continue
        for transposed, add in ((False, False), (True, False), (True, True)):
            yield kept_product_case(arch, tile.adding() if add else tile, transposed, add)


def kept_product_case(arch: str, tile: KeptTile, transposed: bool, add: bool) -> Case:
    target, tma = arch.removesuffix("-pointer"), arch == "sm_90"
    constants: dict[str, Any] = {
        "BLOCK_M": KEPT_ROWS, "BLOCK_H": tile.block_h, "BLOCK_K": tile.block_k, "DEPTH": KEPT_ROWS,
        "TRANSPOSED": transposed, "ADD": add, "TMA": tma,
    }  # fmt: skip
    types = {"list_ptr": "*i32", "count_ptr": "*i32", "right": "*bf16"}
    if transposed and not add:
        types["out_ptr"] = "*bf16"
    if tma:
        box = (tile.block_k, KEPT_ROWS) if transposed else (KEPT_ROWS, tile.block_k)
        types["e"] = f"tensordesc<bf16[{box[0]},{box[1]}]>"
        types["right"] = f"tensordesc<bf16[{tile.block_k},{tile.block_h}]>"
    label = f"kept_product {arch} {'E^T' if transposed else 'E'}{' add' * add}"
    limit = SPILLS_UNALIGNED if arch == "sm_90-pointer" else 0
    return Case(
        target, label, "kept_product", "_kept_product_kernel", types, constants, tile.num_warps,
        tile.num_stages, target == "sm_90", limit, arch != "sm_90-pointer",
    )  # fmt: skip


def kept_tiles_cases(target: str) -> Iterator[Case]:
    types = {"mask_ptr": "*i8", "units_ptr": "*i32", "blocks_ptr": "*i32"}
    wide = {"ROWS": KEPT_ROWS, "UNIT": 128, "BLOCK_U": 32}
    for kernel, warps, constants in (
        ("_kept_tiles_kernel", 8, wide), ("_kept_blocks_kernel", 1, {"BLOCK_U": 32}),
    ):  # fmt: skip
        yield Case(target, kernel, "kept_tiles", kernel, types, constants, warps, 3, False, 0)


def shipped_cases(target: str) -> list[Case]:
    """Everything that runs on a target ("sm_90" or "sm_80")."""
    return [
        *gemm_cases(target), *off_range_cases(target), *target_logit_cases(target),
        *row_cases(target), *kept_product_cases(target), *kept_tiles_cases(target),
    ]  # fmt: skip
