"""What every test relies on: one thread, no network, fixed seeds, gpu tests skipped by name."""

import atexit
import gc
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator

# Read at import by torch, transformers, datasets and huggingface_hub: set before any of these
# is imported.
_DEFAULTS = {
    "OMP_NUM_THREADS": "1",  # tiny tensors: several times faster than a thread pool
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_DISABLED": "true",
    "MPLBACKEND": "Agg",
}
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
NVIDIA = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/proc/driver/nvidia/version")
if not any(map(os.path.exists, NVIDIA)):
    # Triton reads it when a kernel is defined: for the whole process, or tests would depend on the
    # order in which their modules are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "HF_DATASETS_CACHE" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="dpo-fast-tests-")
    os.environ["HF_DATASETS_CACHE"] = _cache
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile(
    "dpo-fast", deadline=None, derandomize=True, database=None, max_examples=40
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dpo-fast"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1 is set and there is a CUDA device: unset it")
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="gpu: no CUDA device on this machine (make test-gpu)")
        for item in gpu_items:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What is imported by now stays: every training collects garbage first, and looking through
    all modules takes it half a second.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extensions complain of what is never freed


_dead: list[str] = []  # the test after which the CUDA context answers nothing but errors


@pytest.fixture(autouse=True)
def _cuda_context(request: pytest.FixtureRequest) -> Iterator[None]:
    """Errors of a test's kernels are that test's; what follows a dead context is skipped."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    import torch

    if _dead:
        pytest.skip(f"gpu: the CUDA context died in {_dead[0]}")
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        _dead.append(request.node.nodeid)
        raise
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    """The global generators start each test at the same point (those of imported modules)."""
    random.seed(0)
    for module in ("numpy", "torch"):
        if module in sys.modules:
            seed = (
                sys.modules[module].random.seed
                if module == "numpy"
                else sys.modules[module].manual_seed
            )
            seed(0)
    yield
