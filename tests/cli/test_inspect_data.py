"""`dpo-fast inspect-data`: train's options, a table or JSON, a picture."""

import json
from pathlib import Path

import pytest

from dpo_fast.cli import main


def words(material: Path, *more: str) -> list[str]:
    model, data = str(material / "model"), str(material / "train.jsonl")
    return ["inspect-data", "--model_name_or_path", model, "--dataset_name", data, *more]


def test_json_and_picture(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "lengths.png"
    options = ["--max_length", "64", "--json", "--picture", str(picture)]
    assert main(words(material, *options)) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["rows"], said["max_length"], said["ties"]) == (12, 64, 0)
    assert set(said["tokens"]) == {"padded", "packed", "shared_prefix"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_table(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(material)) == 0
    said = capsys.readouterr().out
    for text in ("to train on", "duplicates", "median", "shared_prefix", "of padded"):
        assert text in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--picture"], "needs the path"),
        (["--picture", "x.jpg"], "PNG"),
        (["--streaming", "true"], "every pair is read"),
        (["--dataset_name", "./none.jsonl"], "there is no file"),
    ],
)
def test_wrong_words_are_explained(
    material: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(material, *more)) == 2
    assert message in capsys.readouterr().err
