"""`dpo-fast doctor`: right where all is well, 1 and a name where something is not."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_fast import Trainer
from dpo_fast.cli import doctor_facts, doctor_parity, main

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def found(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code = main(["doctor", "--json", *words])
    out = json.loads(capsys.readouterr().out)
    assert code == (0 if out["ok"] else 1)
    return out


def failures(report: dict[str, Any]) -> list[str]:
    return [check["name"] for check in report["checks"] if check["status"] == "fail"]


def test_healthy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    report = found(capsys, "--ref_cache_dir", str(tmp_path / "cache"))
    assert report["ok"] and failures(report) == []
    by_name = {check["name"]: check for check in report["checks"]}
    assert by_name["torch"]["detail"] == torch.__version__
    assert "cpu (not triton:" in by_name["LM head, cpu float32"]["detail"]
    assert {"log-probs, cpu float32", "dweight, cpu bfloat16", "EMA, cpu float32"} <= set(by_name)
    assert str(tmp_path / "cache") in by_name["reference cache"]["detail"]


def test_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--ref_cache_dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for part in ("versions", "devices", "compiled", "backends", "folders", "self-check"):
        assert f"\n{part}\n" in text
    assert "tolerance" in text and text.rstrip().endswith("Training works here.")


@pytest.mark.parametrize("what", ["value", "gradient", "nan"])
def test_wrong_numbers_are_found(
    what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = doctor_parity.linear_logprobs

    def wrong(hidden: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if what == "gradient":
            hidden = hidden + (hidden - hidden.detach()) * 0.2  # same value, 1.2 times dhidden
        logps = real(hidden, weight, *args, **kwargs)
        return {"value": logps + 0.2, "gradient": logps, "nan": logps * float("nan")}[what]

    monkeypatch.setattr(doctor_parity, "linear_logprobs", wrong)
    report = found(capsys, "--ref_cache_dir", str(tmp_path))
    expected = "dhidden" if what == "gradient" else "log-probs"
    assert {f"{expected}, cpu float32", f"{expected}, cpu bfloat16"} <= set(failures(report))
    assert not any("EMA" in name for name in failures(report))


def test_a_kernel_that_does_not_run_is_a_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(doctor_parity, "linear_logprobs", broken)
    report = found(capsys, "--ref_cache_dir", str(tmp_path))
    assert len(failures(report)) == 2
    assert any("no kernel image" in check["detail"] for check in report["checks"])


@pytest.mark.parametrize(
    ("package", "version", "fails"),
    [
        ("transformers", "4.57.1", True),
        ("peft", None, True),
        ("torch", None, True),
        ("torch", "2.11.0a0+nv26", False),
        ("triton", None, False),
        ("trl", None, False),
    ],
)
def test_versions(
    package: str, version: str | None, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor_facts.installed
    monkeypatch.setattr(
        doctor_facts, "installed", lambda name: version if name == package else real(name)
    )
    checks = {check.name: check for check in doctor_facts.version_checks()}
    assert (checks[package].status == "fail") is fails
    if fails:
        assert f"pip install -U '{package}>=" in checks[package].remedy


def test_floors_are_those_of_the_metadata() -> None:
    needed = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    floors = dict(line.partition(";")[0].strip().split(">=") for line in needed)
    for name, floor in doctor_facts.FLOORS.items():
        if name == "transformers":  # the ops work below what the Trainer needs
            assert floors[name] == "4.56" and floor == Trainer.transformers_floor == "5.17"
        else:
            assert floors[name] == floor


def test_unwritable_cache(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = found(capsys, "--ref_cache_dir", str(tmp_path / "file" / "cache"))
    assert failures(report) == ["reference cache"]


def test_without_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_fast.backends.ema.compiled.extension", lambda: "it is not there")
    (check,) = doctor_facts.compiled_checks()
    assert check.status == "note" and "slower" in check.detail and "compiler" in check.remedy
