"""Devices by name: memory, peak rates, bandwidth, each from the vendor's data sheet.

Dense rates (no sparsity), in FLOP/s; float32 without TF32, since that is PyTorch's default. Memory
is what the data sheet says, in bytes of 10^9; a driver and CUDA context take 0.5 to 1.5 GB of it.
"""

import os
import time
from dataclasses import dataclass, replace

import torch

_SHEET = "https://www.nvidia.com/en-us/data-center"


@dataclass(frozen=True)
class Device:
    """``memory`` in bytes, ``bf16`` and ``fp32`` in FLOP/s, ``bandwidth`` in bytes/s."""

    name: str
    kind: str  # of torch: cuda or cpu
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    source: str

    def rate(self, precision: str) -> float:
        """Peak of the products of a precision (``dpo_fast.plan.Setting``)."""
        return self.fp32 if precision == "fp32" else self.bf16


DEVICES = {
    d.name: d
    for d in (
        Device("H200", "cuda", 141e9, 989e12, 67e12, 4.8e12, f"{_SHEET}/h200/"),
        Device("H100", "cuda", 80e9, 989e12, 67e12, 3.35e12, f"{_SHEET}/h100/"),
        Device("A100-80GB", "cuda", 80e9, 312e12, 19.5e12, 2.039e12, f"{_SHEET}/a100/"),
        Device("A100-40GB", "cuda", 40e9, 312e12, 19.5e12, 1.555e12, f"{_SHEET}/a100/"),
        Device("L40S", "cuda", 48e9, 362e12, 91.6e12, 0.864e12, f"{_SHEET}/l40s/"),
        Device("A10", "cuda", 24e9, 125e12, 31.2e12, 0.6e12, f"{_SHEET}/products/a10-gpu/"),
        Device(
            "RTX4090",
            "cuda",
            24e9,
            165.2e12,
            82.6e12,
            1.008e12,
            "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/"
            "nvidia-ada-gpu-architecture.pdf",
        ),
    )
}


def find_device(name: str, **overrides: float | None) -> Device:
    """A device of the table, ``"cpu"`` (this one, measured) or ``"auto"``: the GPU that is here if
    the table has it, else H100.

    Args:
        overrides: fields of :class:`Device` to set; None leaves them.

    Raises:
        ValueError: no such name; lists the known ones.
    """
    known = {key.lower(): device for key, device in DEVICES.items()}
    if name == "auto":
        device = _present() or DEVICES["H100"]
    elif name.lower() == "cpu":
        device = this_cpu()
    elif name.lower() in known:
        device = known[name.lower()]
    else:
        raise ValueError(
            f"device {name!r} is not in the table: use one of {', '.join(DEVICES)}, cpu, auto; or "
            "the nearest one with --memory, --tflops and --bandwidth of yours"
        )
    given = {key: value for key, value in overrides.items() if value is not None}
    return replace(device, **given) if given else device  # type: ignore[arg-type]


def _present() -> Device | None:
    """The CUDA device of this machine, with its own memory, if its name is in the table."""
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    for name, device in DEVICES.items():
        if name.partition("-")[0] in facts.name.replace(" ", ""):
            return replace(device, memory=float(facts.total_memory))
    return None


def this_cpu() -> Device:
    """This machine: its memory, and rates from two short measurements (about 0.2 s)."""
    from dpo_fast.reference.estimate import matmul_rate

    cpu = torch.device("cpu")
    rates = {d: matmul_rate(cpu, d) for d in (torch.float32, torch.bfloat16)}
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device(
        "cpu",
        "cpu",
        memory,
        rates[torch.bfloat16],
        rates[torch.float32],
        _copy_bandwidth(),
        "measured now",
    )


def _copy_bandwidth() -> float:
    """Bytes a second of a 64 MiB copy, read and written, best of a few."""
    source = torch.ones(2**24)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best
