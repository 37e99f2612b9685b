"""What README.md shows works: its Python runs, its commands, flags and files exist."""

import contextlib
import io
import itertools
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The words of every command line in a ``bash`` block, and in backticks where one is meant."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    starts = ("make ", "dpo-fast ", "python ", "accelerate ")
    quoted = [code for code in re.findall(r"`([^`\n]+)`", prose) if code.startswith(starts)]
    words = [shlex.split(line, comments=True) for line in [*lines, *quoted]]
    return [one for one in words if one]


def test_something_is_checked() -> None:
    first = {words[0] for words in commands()}
    assert blocks("python") and {"make", "dpo-fast", "pip", "python"} <= first


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block, in a folder of its own, with a tiny model where a name is asked for."""
    monkeypatch.chdir(tmp_path)
    code = blocks("python")[number]
    path = save_tiny(tmp_path / "model")
    exec(compile(code.replace("path/or/hub-name", path), f"README block {number}", "exec"), {})


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        missing = [t for t in targets if not re.search(rf"^{t}:", MAKEFILE, flags=re.MULTILINE)]
        assert targets and not missing
    elif program == "dpo-fast":
        check_cli(rest)
    elif program == "python":
        check_python(rest)
    elif program == "pip":
        files = [word for flag, word in itertools.pairwise(rest) if flag in ("-c", "-r")]
        assert rest[0] == "install" and all((ROOT / file).is_file() for file in files)
    elif program == "accelerate":
        assert rest[:2] == ["launch", "--config_file"] and (ROOT / rest[2]).is_file()
    else:
        pytest.fail(f"README shows {program!r}, which this test does not know how to check")


def check_cli(words: list[str]) -> None:
    from dpo_fast.cli.app import find_command

    name, *rest = words
    module = find_command(name).module
    assert find_spec(module), f"dpo-fast {name} has no module"
    flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
    shown = io.StringIO()
    if flags:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            import_module(module).run(["--help"])
    unknown = [flag for flag in flags if not re.search(rf"{flag}\b", shown.getvalue())]
    assert not unknown, f"dpo-fast {name} --help does not show {unknown}"


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert find_spec(words[1]), f"python -m {words[1]}: there is no such module"
    else:
        assert (ROOT / words[0]).is_file()


def test_files_that_are_named_exist() -> None:
    named = re.findall(r"`((?:tests|benchmarks|examples|csrc|dpo_fast)/[\w/.*-]*)`", README)
    assert named
    missing = [name for name in named if not list(ROOT.glob(name))]
    assert not missing
