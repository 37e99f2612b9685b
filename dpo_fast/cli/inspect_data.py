"""`dpo-fast inspect-data`: lengths, truncation, ties, duplicates, before any training."""

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_fast.cli.errors import UsageError
from dpo_fast.cli.logs import show_logs
from dpo_fast.cli.tables import print_table

if TYPE_CHECKING:
    from dpo_fast.cli.parser import Arguments
    from dpo_fast.inspection import Inspection

logger = logging.getLogger("dpo_fast")

DESCRIPTION = (
    "Tokenise the pairs as `dpo-fast train` would and say what is in them: lengths, what "
    "max_length cuts, pairs that would be dropped and why, ties, duplicates, what each layout "
    "would compute. Takes the options of train, and --json (one object instead of the tables) and "
    "--picture FILE.png (histograms; default: none)."
)


def run(words: list[str]) -> int:
    """Print tables or JSON, and draw if asked."""
    show_logs()
    words, as_json, picture = _take_own(list(words))
    from dpo_fast.cli.parser import parse

    with tempfile.TemporaryDirectory(prefix="dpo-fast-") as scratch:
        arguments = parse("dpo-fast inspect-data", DESCRIPTION, words, output_dir=scratch)
        found = inspect(arguments)
    if picture is not None:
        from dpo_fast.inspection import draw

        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(draw(found))
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show(found)
        if picture is not None:
            print(f"\npicture: {picture}")
    return 0


def _take_own(words: list[str]) -> tuple[list[str], bool, Path | None]:
    """The words that train knows, and the two options that only this command has."""
    rest: list[str] = []
    as_json, picture = False, None
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word == "--json":
            as_json = True
        elif name == "--picture":
            value = value if equals else (words.pop(0) if words else "")
            if not value or value.startswith("--"):
                raise UsageError("--picture needs the path of a PNG file.")
            if not value.lower().endswith(".png"):
                raise UsageError(f"--picture {value}: the picture is a PNG, name it so.")
            picture = Path(value).expanduser()
        else:
            rest.append(word)
    return rest, as_json, picture


def inspect(arguments: "Arguments") -> "Inspection":
    """What the arguments' training data hold.

    Raises:
        UsageError: paths, names, splits. ValueError, TypeError: as ``prepare_dataset``.
    """
    from dpo_fast.cli.checks import check_data, check_model
    from dpo_fast.cli.data import load_data
    from dpo_fast.cli.policy import load_tokenizer
    from dpo_fast.inspection import inspect_dataset

    model, data, args = arguments
    if data.streaming:
        raise UsageError(
            "--streaming: every pair is read and counted, so load them whole (a slice such as "
            "--dataset_train_split 'train[:10000]' is enough of a large data set)."
        )
    check_model(str(model.model_name_or_path), "--model_name_or_path")
    check_data(data)
    dataset, _ = load_data(data, evaluated=False)
    return inspect_dataset(
        dataset,
        load_tokenizer(model, args),
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        num_proc=args.dataset_num_proc,
        batch_size=args.per_device_train_batch_size,
        name=data.dataset_train_split,
    )


def show(found: "Inspection") -> None:
    """Tables on stdout."""
    counts = [[name, f"{number:,}", note] for name, number, note in counted(found)]
    print_table("Pairs", ["", "pairs", ""], counts)
    print()
    quantiles = found.quantiles()
    headers = ["tokens", *next(iter(quantiles.values()))]
    rows = [[name, *(f"{v:,.0f}" for v in line.values())] for name, line in quantiles.items()]
    print_table("Lengths", headers, rows)
    print()
    full = max(found.tokens["padded"], 1)
    layouts = [[n, f"{t:,}", f"{100 * t / full:.1f} %"] for n, t in found.tokens.items()]
    title = (
        f"Layouts ({found.batch_size} pairs a padded batch): padding {found.padding_share:.1%} of "
        f"padded rows, second copies of prompts {found.prefix_share:.1%} of all tokens"
    )
    print_table(title, ["layout", "tokens", "of padded"], layouts)
    if found.prompt_example is not None:
        print(f"\nend of a prompt that its sequence does not hold: {found.prompt_example!r}")


def counted(found: "Inspection") -> Iterator[tuple[str, int, str]]:
    """Name, number, and what it means."""
    limit = found.max_length
    yield "given", found.rows, ""
    yield "to train on", found.kept, ""
    for reason, count in found.dropped.items():
        yield "dropped", count, reason
    yield "truncated", found.truncated, f"an answer's sequence is longer than {limit} tokens"
    yield (
        "prompt is no prefix",
        found.prompt_not_prefix,
        "its own tokens are not those with which its answers' sequences begin",
    )
    yield "ties", found.ties, "chosen and rejected are the same tokens: nothing to learn"
    yield "ties once truncated", found.ties_after_truncation, "their difference is cut off"
    yield "duplicates", found.duplicates, "prompt, chosen and rejected occurred before"
    yield "contradictions", found.contradictions, "occur with chosen and rejected exchanged, too"
    yield "shared prompts", found.shared_prompts, f"have company; {found.prompts:,} prompts differ"
