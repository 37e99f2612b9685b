"""Small C++ yardsticks (STREAM's triad, the rate of FMAs), compiled here and now with OpenMP."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")


def compiler() -> str | None:
    """Path of a C++ compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++")


@cache
def library(name: str) -> ctypes.CDLL:
    """``<name>.cpp`` beside this file, compiled for this processor.

    Raises:
        RuntimeError: there is no compiler.
    """
    found = compiler()
    if found is None:
        raise RuntimeError(f"{name}.cpp needs a C++ compiler: install g++")
    source = Path(__file__).with_name(f"{name}.cpp")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{name}.so"
        subprocess.run([found, *FLAGS, str(source), "-o", str(target)], check=True)
        return ctypes.CDLL(str(target))
