"""Builds ``dpo_fast._C`` from csrc/: C++ always, CUDA where nvcc is found.

No libtorch: the module takes pointers, sizes and a stream, so it builds in seconds in an isolated
environment and needs no rebuild for another torch. Without a compiler the installation still
succeeds; ``dpo-fast doctor`` then names what is missing and what that costs.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, LinkError, PlatformError

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:  # `python setup.py` outside an isolated build, without pybind11
    Pybind11Extension = None

ROOT = Path(__file__).parent
CUDA_ARCHS = os.environ.get("DPO_FAST_CUDA_ARCHS", "80;90").split(";")
BUILD_FAILURES = (CCompilerError, CompileError, ExecError, LinkError, PlatformError, OSError)


def find_nvcc() -> str | None:
    """Path of nvcc, or None; DPO_FAST_CUDA=0 leaves the CUDA part out."""
    if os.environ.get("DPO_FAST_CUDA", "1") == "0":
        return None
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def cuda_gencode() -> list[str]:
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
    newest = max(CUDA_ARCHS, key=int)
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def cuda_library_dirs(nvcc: str) -> list[str]:
    """Where nvcc itself would look for the static runtime; also right for a wrapper script."""
    said = subprocess.run(
        [nvcc, "--dryrun", "none.cu"], capture_output=True, text=True, check=False
    ).stderr
    libraries = next((line for line in said.splitlines() if "LIBRARIES=" in line), "")
    found = [
        d for d in re.findall(r'-L([^"]+)', libraries) if (Path(d) / "libcudart_static.a").exists()
    ]
    if not found:
        raise CompileError(
            f"{nvcc} is there, but libcudart_static.a is not (searched: {libraries or 'nothing'})"
        )
    return found


def compile_cuda(nvcc: str, source: Path, target: Path) -> None:
    """One object file; kept while neither the sources nor the command changed."""
    import pybind11

    command = [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC", "--threads", "0", *cuda_gencode()]
    command += [f"-I{pybind11.get_include()}", "-c", str(source), "-o", str(target)]
    record, text = target.with_suffix(".command"), " ".join(command)
    newest = max(p.stat().st_mtime for p in (source, *source.parent.glob("*.h")))
    fresh = target.exists() and target.stat().st_mtime > newest
    if fresh and record.exists() and record.read_text() == text:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    print(text)
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise CompileError(f"nvcc failed on {source.name}: {error}") from error
    record.write_text(text)


class BuildExt(build_ext):
    """Compiles .cu files with nvcc; a failed build is a message instead of a failed install."""

    def run(self) -> None:
        try:
            super().run()
        except BUILD_FAILURES as error:
            self.report(error)

    def build_extension(self, ext) -> None:
        try:
            self.add_cuda_objects(ext)
        except BUILD_FAILURES as error:
            self.report(error, "the CUDA part of dpo_fast._C")
        try:
            super().build_extension(ext)
        except BUILD_FAILURES as error:
            self.report(error)

    def add_cuda_objects(self, ext) -> None:
        nvcc, sources = find_nvcc(), sorted((ROOT / "csrc").glob("*.cu"))
        if nvcc is None or not sources:
            return
        library_dirs, objects = cuda_library_dirs(nvcc), []
        for source in sources:
            target = Path(self.build_temp) / (source.stem + ".cu.o")
            compile_cuda(nvcc, source, target)
            objects.append(str(target))
        ext.extra_objects = [*ext.extra_objects, *objects]
        ext.define_macros = [*ext.define_macros, ("DPO_FAST_WITH_CUDA", "1")]
        # The static runtime: the module then needs the driver only, whichever CUDA torch brought.
        ext.library_dirs = [*ext.library_dirs, *library_dirs]
        ext.libraries = [*ext.libraries, "cudart_static", "dl", "rt", "pthread"]

    @staticmethod
    def report(error: BaseException, what: str = "the compiled module dpo_fast._C") -> None:
        if os.environ.get("DPO_FAST_REQUIRE_EXT") == "1":
            raise error
        print(
            f"\ndpo_fast: {what} was not built ({error}).\n"
            "dpo_fast works without it, slower on the CPU; install a C++17 compiler (nvcc for the\n"
            "CUDA part) and reinstall to get it. DPO_FAST_REQUIRE_EXT=1 makes this an error,\n"
            "DPO_FAST_CUDA=0 leaves the CUDA part out; `dpo-fast doctor` shows what is missing.\n",
            file=sys.stderr,
        )


def extensions() -> list:
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
    if Pybind11Extension is None or not sources:
        return []
    # No silent fused multiply-add: one formula gives one value, whatever it is inlined into.
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    links = []
    if sys.platform == "linux":  # libgomp has torch's soname: one thread pool for both
        flags, links = [*flags, "-fopenmp"], ["-fopenmp"]
    return [
        Pybind11Extension(
            "dpo_fast._C",
            sources,
            cxx_std=17,
            extra_compile_args=flags,
            extra_link_args=links,
            depends=[
                str(p.relative_to(ROOT))
                for p in (ROOT / "csrc").iterdir()
                if p.suffix in (".h", ".cu")
            ],
        )
    ]


def find_packages() -> list[str]:
    names = []
    for top, where in (("dpo_fast", ROOT), ("dpo_fast_kernels", ROOT / "kernels")):
        for init in sorted((where / top).rglob("__init__.py")):
            names.append(".".join(init.parent.relative_to(where).parts))
    return names


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt}, packages=find_packages())
