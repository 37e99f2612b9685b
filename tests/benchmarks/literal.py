"""A result as a suite writes it, with numbers that a reader can check by eye."""

from typing import Any

OURS = 0.1  # seconds of dpo_fast


def row(
    seconds: float, peak: float = 8.0, error: float = 1e-6, ours: float = 0.1
) -> dict[str, Any]:
    """A variant that was timed three times."""
    values = [seconds, seconds * 1.1, seconds * 0.9]
    return {
        "errors": {"logps": error},
        "seconds": seconds,
        "quartiles": [seconds * 0.9, seconds * 1.1],
        "all_seconds": values,
        "over_ours": seconds / OURS,
        "peak_mib": peak,
    }


def case(rows: dict[str, Any], curves: list[str], n: float = 64.0) -> dict[str, Any]:
    """At N = n; the limit is n / 1000 seconds."""
    return {
        "axes": {"N": n, "V": 4000.0},
        "curves": curves,
        "notes": {"dtype": "float32", "tokens": {"padded": 12, "packed": 7.5}},
        "limits": {"logps": 2e-2},
        "ceilings": {
            "gemm_flops": 32e9,
            "fma_flops": 60e9,
            "copy_bytes": 17.6e9,
            "dtype": "float32",
        },
        "floor_seconds": n / 1000,
        "rows": rows,
    }


def result() -> dict[str, Any]:
    """Time of naive grows as N^2, that of dpo_fast as N; one variant absent, one refused."""
    cases = {
        f"N = {n}": case({"naive": row(n * n / 1e3), "dpo_fast": row(n / 1e2)}, ["N"], float(n))
        for n in (2, 4, 8)
    }
    rows = {
        "naive": row(1.0, 64.0, 0.2),
        "TRL": {"left_out": "trl is not installed: pip install trl"},
        "Liger": {"errors": {"logps": 5.0}, "refused": "logps is off by 5.00e+00: no speed"},
        "dpo_fast": row(0.1, 4.0),
    }
    return {
        "suite": "head",
        "about": "the LM head",
        "device": "cpu",
        "quick": True,
        "machine": {
            "cpu": "a CPU",
            "threads": 2,
            "torch": "2.13",
            "commit": "abc",
            "date": "today",
        },
        "peers": {"TRL": "absent", "Liger": "0.8.5"},
        "cases": {"base": case(rows, []), **cases},
    }
