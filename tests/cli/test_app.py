"""The top level: help and version cost nothing, wrong words are explained, errors become codes."""

import subprocess
import sys
import types

import pytest

import dpo_fast
from dpo_fast.cli import COMMANDS, main
from dpo_fast.cli.errors import UsageError, nearest, reported

LIGHT = """
import sys
from dpo_fast.cli import main
for words in (["--help"], ["--version"], []):
    main(words)
heavy = {"torch", "transformers", "datasets", "peft", "rich", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_and_version_load_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"dpo-fast {dpo_fast.__version__}" in done.stdout


def test_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dpo_fast.cli", "trian"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "did you mean train?" in done.stderr and "Traceback" not in done.stderr


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: dpo-fast {command}" in text
    if command in ("train", "precompute"):
        for option in ("--config", "--model_name_or_path", "--lora_r", "--reference", "--beta"):
            assert option in text


def raiser(error: BaseException, module: str) -> types.FunctionType:
    """A function of a module of that name, which raises."""
    source = types.ModuleType(module)
    vars(source)["error"] = error
    exec("def fail():\n    raise error", vars(source))
    return vars(source)["fail"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("wrong"), 2),
        (ValueError("wrong"), 1),
        (FloatingPointError("wrong"), 1),
        (KeyboardInterrupt("wrong"), 130),
    ],
)
def test_own_errors_become_messages(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with reported("dpo-fast train") as outcome:
        raiser(error, "dpo_fast.somewhere")()
    assert outcome.code == code
    shown = capsys.readouterr().err
    assert shown.startswith("dpo-fast train: ") and "wrong" in shown


def test_errors_of_others_keep_their_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="wrong"), reported("dpo-fast train"):
        raiser(ValueError("wrong"), "dpo_faster.somewhere")()
    with pytest.raises(AssertionError), reported("dpo-fast train"):
        raiser(AssertionError("ours to mend"), "dpo_fast.somewhere")()
    monkeypatch.setenv("DPO_FAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="wrong"), reported("dpo-fast train"):
        raiser(ValueError("wrong"), "dpo_fast.somewhere")()


def test_nearest() -> None:
    assert nearest("bata", ["beta", "gamma"], "--") == "; did you mean --beta?"
    assert nearest("xyz", ["beta", "gamma"]) == ""


def test_demo_is_thin(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    demo = types.ModuleType("dpo_fast.demo")
    demo.run_demo = lambda **kwargs: calls.append(kwargs) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dpo_fast.demo", demo)
    monkeypatch.setattr(dpo_fast, "demo", demo, raising=False)
    assert main(["demo", "--seed", "7"]) == 3
    assert calls == [{"output_dir": "runs/demo", "seed": 7}]
