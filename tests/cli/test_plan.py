"""`dpo-fast plan`: a table or JSON from a folder that holds a config and no weight."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_fast.cli import main
from tests.plan.cases import CASES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    CASES["full-fp32-padded-frozen"].config().save_pretrained(folder)
    return folder


def plan(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    assert main(["plan", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_every_cell_and_the_choice(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [path.name for path in model.iterdir()] == ["config.json"]
    said = plan(capsys, model, "--device", "A100-40GB", "--prompt_tokens", 64, 32)
    assert len(said["cells"]) == 3 * (3 + 4)
    for cell in said["cells"]:
        assert cell["peak"] == sum(cell["memory"].values())
        assert cell["fits"] is True
    assert said["best"]["reference"] == "precomputed"
    assert said["best"]["layout"] == "shared_prefix"
    assert said["device"]["memory"] == 40e9
    assert "GiB" in said["reason"]


def test_the_table_says_what_does_not_fit(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(model), "--device", "H100", "--memory", "0.01", "--kind", "full"]
    assert main(words) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.startswith(("padded", "packed"))]
    assert len(rows) == 6
    assert all("no" in row for row in rows)
    assert "nothing fits" in said


def test_lengths_come_from_a_data_set(
    model: Path, material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset_name", material / "train.jsonl", "--tokenizer", material / "model"]
    said = plan(capsys, model, *words, "--device", "cpu", "--kind", "full", "--layout", "packed")
    assert said["pairs"].startswith("8 pairs a micro-batch out of 12")
    assert {cell["layout"] for cell in said["cells"]} == {"packed"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "abacus"], "not in the table"),
        (["--prompt_tokens", "0"], "at least 1"),
        (["--kind", "full", "--reference", "adapter"], "needs --kind lora"),
        (["--dataset_name", "./none.jsonl"], "none.jsonl"),
    ],
)
def test_wrong_words_are_explained(
    model: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(model), *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_folder_without_a_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tmp_path)]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_an_encoder_decoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import T5Config

    T5Config(num_layers=1).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path)]) == 1
    assert "is an encoder-decoder (model_type 't5')" in capsys.readouterr().err
