"""The demo's numbers as text: verdicts, samples, the table of strategies."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_fast.demo.settings import Thresholds

COLUMNS = (
    "reference",
    "loss",
    "accuracy",
    "margin",
    "answers right",
    "seconds",
    "peak memory",
    "reference: time",
    "reference: memory",
    "reference: disk",
)
NOTES = """\
loss, margin: on the held-out pairs, against the strategy's own reference (that of ema has moved).
accuracy: share of the held-out pairs whose chosen answer is likelier than the rejected one.
answers right: share of the held-out questions that the model, asked, answers rightly (greedily).
seconds: making the reference and training, without evaluation; reference: time is its part of it.
peak memory: of the process of this strategy, above what it had before the model was loaded.
reference: memory: weights that it does not share with the policy; disk: its cached log-probs."""


class Check(NamedTuple):
    """One thing that the demo must show."""

    what: str
    passed: bool


def checks_of(results: Mapping[str, Any], limits: Thresholds) -> list[Check]:
    """Everything that decides the exit code."""
    checks = [
        Check("every pair is right by the checker", results["data"]["wrong_pairs"] == 0),
        Check("no question is both train and held-out", results["data"]["shared_questions"] == 0),
    ]
    for name, accuracy in results["baselines"].items():
        what = f"{name}: {accuracy:.3f} <= {limits.baseline_at_most}"
        checks.append(Check(what, accuracy <= limits.baseline_at_most))
    before = results["before"]["accuracy"]
    what = f"accuracy before DPO: {before:.3f} <= {limits.before_at_most}"
    checks.append(Check(what, before <= limits.before_at_most))
    for name, result in results["strategies"].items():
        after = result["accuracy"]
        what = f"accuracy after DPO, {name}: {after:.3f} > {limits.after_above}"
        checks.append(Check(what, after > limits.after_above))
    return checks


def rows_of(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's cells, a row a strategy, the model before DPO first."""
    before = results["before"]
    rows: list[tuple[str, ...]] = [
        (
            "none: before DPO",
            "",
            f"{before['accuracy']:.3f}",
            "",
            f"{before['answers_right']:.3f}",
            f"{before['seconds']:.1f}",
            "",
            "",
            "",
            "",
        )
    ]
    for name, result in results["strategies"].items():
        seconds = result["reference_seconds"]
        rows.append(
            (
                name,
                f"{result['loss']:.4f}",
                f"{result['accuracy']:.3f}",
                f"{result['margin']:+.2f}",
                f"{result['answers_right']:.3f}",
                f"{result['seconds']:.1f}",
                amount(result["peak_bytes"]),
                f"{seconds['before']:.1f} + {seconds['during']:.1f} s",
                amount(result["reference_bytes"]),
                amount(result["reference_disk_bytes"]),
            )
        )
    return rows


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also aligned as text."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join([line(columns), line(rule), *map(line, rows)])


def amount(count: int) -> str:
    """Bytes in a readable unit."""
    if count == 0:
        return "0"
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.1f} MB"


def samples_text(results: Mapping[str, Any], strategy: str) -> str:
    """Held-out questions, and what the model said before and after DPO."""
    after = results["strategies"][strategy]["samples"]
    lines = []
    for old, new in zip(results["before"]["samples"], after, strict=True):
        lines += [
            f"  {old['question']}",
            f"    before  {_mark(old['right'])}  {old['answer']}",
            f"    after   {_mark(new['right'])}  {new['answer']}",
        ]
    return "\n".join(lines)


def _mark(right: bool) -> str:
    return "right" if right else "wrong"


def markdown(results: Mapping[str, Any], checks: Sequence[Check]) -> str:
    """The whole report, for ``demo.md``."""
    data, before = results["data"], results["before"]
    baselines = [(name, f"{accuracy:.3f}") for name, accuracy in results["baselines"].items()]
    first = next(iter(results["strategies"]))
    return "\n".join(
        [
            "# dpo-fast demo",
            "",
            f"{data['train']} train pairs and {data['heldout']} held-out pairs; a Llama of "
            f"{before['parameters'] / 1e6:.2f} M parameters, vocabulary {before['vocabulary']}; "
            f"{results['machine']}.",
            "",
            table(("without reading the question", "accuracy"), baselines),
            "",
            table(COLUMNS, rows_of(results)),
            "",
            *(f"- {note}" for note in NOTES.splitlines()),
            "",
            "![what was learned, and what it took](demo.png)",
            "",
            f"Held-out questions, before and after DPO (reference = {first}):",
            "",
            "```",
            samples_text(results, first),
            "```",
            "",
            *(f"- [{'x' if check.passed else ' '}] {check.what}" for check in checks),
            "",
        ]
    )
