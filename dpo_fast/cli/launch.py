"""`dpo-fast train --accelerate-config fsdp2`: the same command again, on each device.

accelerate's launcher starts it. Its own options (``--num_processes 4``, ``--main_process_port``,
...) go to it; everything else stays the command's.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import yaml

from dpo_fast.cli.errors import UsageError

ENGINES = Path(__file__).parent / "engines"
FLAG = "accelerate_config"
# Those of `accelerate launch` that say where and how many.
LAUNCHER_OPTIONS = (
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "gpu_ids",
)


def launch_command(command: str, words: list[str]) -> list[str] | None:
    """The command line that runs ``dpo-fast COMMAND WORDS`` under accelerate; None: as it is.

    Raises:
        UsageError: no such config, options of a launcher without one, a launcher inside of a
            launcher, or DeepSpeed asked for and not installed.
    """
    rest, own = _take(words)
    config = own.pop(FLAG, None)
    if config is None:
        if own:
            name = next(iter(own))
            raise UsageError(
                f"--{name} is an option of the launcher: add --accelerate-config "
                f"{'|'.join(engine_names())} (or a YAML file)."
            )
        return None
    if "RANK" in os.environ:
        raise UsageError(
            f"--accelerate-config {config} starts the ranks itself, and this process is one of a "
            "launcher's already: drop one of the two."
        )
    path = config_path(config)
    _check_engine(path)
    options = [word for name, value in own.items() for word in (f"--{name}", value)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    return [*launcher, *options, "-m", "dpo_fast.cli", command, *rest]


def engine_names() -> list[str]:
    """The configs that come with dpo_fast."""
    return sorted(path.stem for path in ENGINES.glob("*.yaml"))


def config_path(config: str) -> Path:
    """The file of a shipped config, or the given one.

    Raises:
        UsageError: neither.
    """
    if config in engine_names():
        return ENGINES / f"{config}.yaml"
    path = Path(config).expanduser()
    if not path.is_file():
        raise UsageError(
            f"--accelerate-config {config}: no file of that name, and none of the shipped ones "
            f"({', '.join(engine_names())})."
        )
    return path


def _check_engine(path: Path) -> None:
    loaded = yaml.safe_load(path.read_text())
    kind = loaded.get("distributed_type") if isinstance(loaded, dict) else None
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise UsageError(
            f"--accelerate-config {path.stem} needs DeepSpeed, which is not installed: pip install "
            "deepspeed, or use fsdp2."
        )


def _take(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words without the launcher's, and those by name."""
    rest: list[str] = []
    own: dict[str, str] = {}
    i = 0
    while i < len(words):
        name, equals, value = words[i].partition("=")
        key = name.removeprefix("--").replace("-", "_")
        i += 1
        if not name.startswith("--") or key not in (FLAG, *LAUNCHER_OPTIONS):
            rest.append(words[i - 1])
            continue
        if not equals:
            value = words[i] if i < len(words) else ""
            i += 1
        if not value or value.startswith("--"):
            raise UsageError(f"{name} needs a value.")
        own[key] = value
    return rest, own
