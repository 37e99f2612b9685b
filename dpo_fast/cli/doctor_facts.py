"""What the doctor looks at without computing: versions, devices, compiled parts, folders."""

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal

from dpo_fast.files import probe_writable

if TYPE_CHECKING:
    import torch

# Package -> the oldest version that `dpo-fast train` works with.
FLOORS = {
    "torch": "2.11",
    "triton": "3.6",
    "transformers": "5.17",
    "peft": "0.18",
    "datasets": "4.7",
    "accelerate": "1.10",
}
OPTIONAL = ("trl", "liger-kernel", "bitsandbytes", "deepspeed")


@dataclass(frozen=True)
class Check:
    """One finding. ``note``: works, at a cost; ``fail``: training does not work."""

    section: str
    name: str
    status: Literal["ok", "note", "fail"]
    detail: str
    remedy: str = ""


def version_checks() -> Iterator[Check]:
    """Python and the packages, against the floors; nothing is imported."""
    from packaging.version import Version

    yield Check("versions", "python", "ok", f"{platform.python_version()} ({sys.executable})")
    for name, floor in FLOORS.items():
        found = installed(name)
        remedy = f"pip install -U '{name}>={floor}'"
        if found is None:
            yield _missing(name, remedy)
        elif Version(found).release < Version(floor).release:  # a container's 2.11.0a0 is 2.11
            detail = f"{found}, but at least {floor} is needed"
            yield Check("versions", name, "fail", detail, remedy)
        else:
            yield Check("versions", name, "ok", found)
    for name in OPTIONAL:
        yield Check("versions", name, "ok", installed(name) or "not installed (optional)")


def _missing(name: str, remedy: str) -> Check:
    if name == "triton":
        cost = "not installed: on a GPU the LM head runs in torch operations, slower"
        return Check("versions", name, "note", cost, f"{remedy} (Linux)")
    return Check("versions", name, "fail", "not installed", remedy)


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_checks() -> Iterator[Check]:
    """CPU and accelerators."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    yield Check("devices", "cpu", "ok", f"{platform.machine()}, {cores} cores, {threads} threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            detail = (
                f"{facts.name}, capability {facts.major}.{facts.minor}, "
                f"{facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
            )
            yield Check("devices", f"cuda:{i}", "ok", detail)
    elif torch.accelerator.is_available():
        kind = str(torch.accelerator.current_accelerator())
        yield Check("devices", kind, "ok", "the chunked torch path runs; no kernels for it")
    else:
        built = torch.version.cuda
        why = "torch is a CPU build" if built is None else f"CUDA {built} finds no device"
        yield Check("devices", "accelerator", "note", f"none ({why}): training runs on the CPU")


def compiled_checks() -> Iterator[Check]:
    """``dpo_fast._C``: is it there, for which instruction set, with CUDA or without."""
    import torch

    from dpo_fast.backends.ema.compiled import extension

    name = "dpo_fast._C"
    module = extension()
    if isinstance(module, str):
        cost = "missing: the CPU's LM head and EMA run in torch operations, slower"
        remedy = f"install a C++ compiler, then reinstall dpo-fast ({module})"
        yield Check("compiled", name, "note", cost, remedy)
        return
    isas = {"epilogue": module.epilogue_isas(), "EMA": module.ema_isas()}
    used = ", ".join(f"{what} {names[0]}" for what, names in isas.items())
    yield Check("compiled", name, "ok", f"CPU part: {used}")
    if module.with_cuda:
        yield Check("compiled", f"{name} (CUDA)", "ok", "built with nvcc")
    else:
        status: Literal["ok", "note"] = "note" if torch.cuda.is_available() else "ok"
        detail = "not built (no nvcc): on a GPU the EMA runs in Triton"
        yield Check("compiled", f"{name} (CUDA)", status, detail)


def dtypes_of(device_type: str) -> tuple[str, ...]:
    """Precisions that training uses on a kind of device."""
    return ("float32", "bfloat16", "float16") if device_type == "cuda" else ("float32", "bfloat16")


def device_types() -> tuple[str, ...]:
    """Kinds of device that are there and have kernels or tests of ours."""
    import torch

    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def backend_checks() -> Iterator[Check]:
    """Which backend ``"auto"`` means on each device, and why not another."""
    import torch

    from dpo_fast.backends.ema.select import choose as choose_ema

    for device in device_types():
        for dtype_name in dtypes_of(device):
            name = f"LM head, {device} {dtype_name}"
            try:
                status, detail = _head_backend(device, getattr(torch, dtype_name))
            except ImportError as error:
                yield Check("backends", name, "fail", str(error), "reinstall dpo-fast")
                continue
            yield Check("backends", name, status, detail)
        ema = choose_ema("auto", torch.device(device)).name
        yield Check("backends", f"EMA, {device}", "ok", ema)


def _head_backend(device: str, dtype: "torch.dtype") -> tuple[Literal["ok", "note"], str]:
    from dpo_fast.backends import choose, triton_refusal

    chosen, refusal = choose("auto", device, dtype).name, triton_refusal(device, dtype)
    if chosen == "triton" or refusal is None:
        return "ok", chosen
    return "note" if device == "cuda" else "ok", f"{chosen} (not triton: {refusal})"


def folder_checks(ref_cache_dir: str | None = None) -> Iterator[Check]:
    """Can the cache of reference log-probs be written?"""
    if ref_cache_dir is None and installed("datasets") is None:
        return  # reported among the versions; the default folder is beside its cache
    from dpo_fast.reference.cache import default_root

    root = default_root() if ref_cache_dir is None else ref_cache_dir
    try:
        path = probe_writable(root, "reference cache")
    except OSError as error:
        yield Check("folders", "reference cache", "fail", str(error), "set --ref_cache_dir")
        return
    yield Check("folders", "reference cache", "ok", f"{path} can be written")
