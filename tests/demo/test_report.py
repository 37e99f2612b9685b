"""The demo's claims, its table, its exit code."""

import copy
import json

import pytest

from dpo_fast.demo import pipeline
from dpo_fast.demo.report import COLUMNS, amount, checks_of, markdown, rows_of, table
from dpo_fast.demo.settings import STRATEGIES, Settings, Thresholds

SAMPLES = [{"question": "Which?", "answer": "That.", "right": True}]


def results(accuracy=0.97):
    strategy = {
        "loss": 0.1,
        "accuracy": accuracy,
        "margin": 2.5,
        "answers_right": 0.9,
        "seconds": 8.0,
        "reference_seconds": {"before": 0.5, "during": 1.5},
        "peak_bytes": 110_000_000,
        "reference_bytes": 1_200_000,
        "reference_disk_bytes": 0,
        "margins": [1.0, -0.5, 3.0],
        "samples": SAMPLES,
        "history": [
            {"step": 1, "loss": 0.7},
            {"step": 2, "loss": 0.6},
            {"step": 2, "eval_rewards/accuracies": 0.9},
        ],
    }
    return {
        "machine": "CPU",
        "data": {"train": 10, "heldout": 5, "wrong_pairs": 0, "shared_questions": 0},
        "baselines": {"length of the answer": 0.5, "bag of words (logistic regression)": 0.55},
        "before": {
            "accuracy": 0.52,
            "answers_right": 0.4,
            "seconds": 5.0,
            "parameters": 300_000,
            "vocabulary": 800,
            "tokens": 26.0,
            "loss": 0.7,
            "margins": [0.1, -0.1, 0.2],
            "samples": [{**SAMPLES[0], "right": False}],
        },
        "strategies": {name: copy.deepcopy(strategy) for name in STRATEGIES},
    }


def failed(changed):
    return [check.what for check in checks_of(changed, Thresholds()) if not check.passed]


def test_all_claims_hold():
    assert failed(results()) == []


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("data", "wrong_pairs"), 1, "checker"),
        (("data", "shared_questions"), 1, "held-out"),
        (("baselines", "length of the answer"), 0.61, "length"),
        (("before", "accuracy"), 0.66, "before DPO"),
        (("strategies", "ema", "accuracy"), 0.9, "ema"),
    ],
)
def test_each_claim_can_fail(path, value, named):
    changed = results()
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert len(failed(changed)) == 1 and named in failed(changed)[0]


def test_table_is_markdown_and_aligned():
    text = table(COLUMNS, rows_of(results()))
    lines = text.splitlines()
    assert len(lines) == 2 + 1 + len(STRATEGIES)
    assert len({len(line) for line in lines}) == 1
    assert "0.5 + 1.5 s" in lines[-1] and "110.0 MB" in lines[-1]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (1500, "2 kB"), (999_999, "1000 kB"), (1_000_000, "1.0 MB")]
)
def test_amount(count, text):
    assert amount(count) == text


def test_markdown_marks_what_failed():
    changed = results(accuracy=0.5)
    text = markdown(changed, checks_of(changed, Thresholds()))
    assert text.count("- [ ]") == len(STRATEGIES) and "- [x] every pair" in text


@pytest.mark.parametrize(("accuracy", "code"), [(0.97, 0), (0.89, 1)])
def test_exit_code_and_files(tmp_path, monkeypatch, capsys, accuracy, code):
    monkeypatch.setattr(pipeline, "_run", lambda *args: results(accuracy))
    assert pipeline.run_demo(tmp_path, settings=Settings()) == code
    assert json.loads((tmp_path / "demo.json").read_text())["data"]["train"] == 10
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert ("FAILED: accuracy after DPO, ema" in capsys.readouterr().out) == bool(code)


def test_unwritable_folder_is_found_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_run", lambda *args: pytest.fail("work began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output folder"):
        pipeline.run_demo(tmp_path / "file" / "out")


def test_environment_is_as_before(tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    seen = {}
    monkeypatch.setattr(pipeline, "_run", lambda *args: seen.update(os.environ) or results())
    pipeline.run_demo(tmp_path)
    assert seen["HF_HUB_OFFLINE"] == seen["HF_DATASETS_OFFLINE"] == "1"
    assert os.environ["HF_HUB_OFFLINE"] == "0" and "HF_DATASETS_OFFLINE" not in os.environ
