"""Whether torch.compile can work here."""

import shutil

from dpo_fast.bench.case import LeftOut


def require_compiler(device: str) -> None:
    """Its CPU code needs a C++ compiler, its GPU code triton.

    Raises:
        LeftOut: it is not there.
    """
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise LeftOut("torch.compile needs a C++ compiler here: install g++")
    if device == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise LeftOut("torch.compile needs triton here: pip install triton")
