"""Writes the preference set of the demo: ``python -m dpo_fast.demo.generate [--out FOLDER]``.

A row is a question with two answers, one right and one wrong:

    user:     Which is smaller, the cup or the tent?
    chosen:   The smaller one is the cup.
    rejected: Smaller? That is the tent.

Nothing in an answer alone tells which is which. Every question has a twin, the same two options
with the opposite question, so that a word is right as often as it is wrong, and so is what the
question names first. Wordings are drawn without regard to what is right and swapped in the twin, so
that neither length nor phrasing helps. `dpo_fast.demo.checker` decides every pair again, from the
text.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_fast.demo import words

TRAIN_PAIRS, HELDOUT_PAIRS = 2100, 280
SEED = 0
FOLDER = Path(__file__).parent
FILES = ("train.jsonl", "heldout.jsonl")

Row = dict[str, object]

# Half of the questions begin with one of these; {n} is a name.
OPENINGS = (
    "Hello!",
    "A question from {n}.",
    "{n} wants to know this.",
    "Quiz time for {n}.",
    "Help me, please.",
    "{n} and I disagree.",
)
# {q} is what was asked for, {o} the option that the answer names.
COMPARATIVES = ("The {q} one is {o}.", "The {q} of the two is {o}.", "{q}? That is {o}.")
NOUNS = ("The {q} is {o}.", "The {q} of the two is {o}.", "A {q}? That is {o}.")


class Scene(NamedTuple):
    """Twin questions: asked for ``asks[i]``, the right answer is ``options[i]``."""

    questions: tuple[str, str]  # {q}: what is asked for; {o}: the two options
    asks: tuple[str, str]
    options: tuple[str, str]
    wordings: tuple[str, str, str] = COMPARATIVES


def _apart(rng: random.Random, classes: Sequence[Sequence[str]], gap: int) -> tuple[str, str]:
    """A low and a high word, at least ``gap`` classes apart."""
    low = rng.randrange(len(classes) - gap)
    high = rng.randrange(low + gap, len(classes))
    return rng.choice(classes[low]), rng.choice(classes[high])


def _named(pair: tuple[str, str]) -> tuple[str, str]:
    return f"the {pair[0]}", f"the {pair[1]}"


def size(rng: random.Random) -> Scene:
    """Small things against big ones."""
    questions = ("Which is {q}, {o}?", "Tell me what is {q}: {o}?")
    return Scene(questions, ("smaller", "bigger"), _named(_apart(rng, words.SIZES, 2)))


def speed(rng: random.Random) -> Scene:
    """Slow things against fast ones."""
    questions = ("Which is {q}, {o}?", "Which of the two is {q}: {o}?")
    return Scene(questions, ("slower", "faster"), _named(_apart(rng, words.SPEEDS, 1)))


def heat(rng: random.Random) -> Scene:
    """Cold things against hot ones."""
    questions = ("Which is {q}, {o}?", "Which of the two is {q}: {o}?")
    return Scene(questions, ("colder", "hotter"), _named(_apart(rng, words.HEATS, 1)))


def month(rng: random.Random) -> Scene:
    """Months, at least three apart."""
    questions = ("Which month comes {q} in the year, {o}?", "What is {q} in the year: {o}?")
    return Scene(questions, ("earlier", "later"), _apart(rng, list(zip(words.MONTHS)), 3))


def letter(rng: random.Random) -> Scene:
    """Letters, at least eight apart."""
    questions = ("In the alphabet, which comes {q}, {o}?", "Which letter comes {q}: {o}?")
    return Scene(questions, ("first", "last"), _apart(rng, list(zip(words.LETTERS)), 8))


def number(rng: random.Random) -> Scene:
    """Numbers, at least ten apart."""
    questions = ("Which number is {q}, {o}?", "Give me the number that is {q}: {o}?")
    return Scene(questions, ("lower", "higher"), _apart(rng, list(zip(words.NUMBERS)), 10))


def sort(rng: random.Random) -> Scene:
    """Things of two sorts."""
    one, other = rng.sample(sorted(words.SORTS), 2)
    options = _named((rng.choice(words.SORTS[one]), rng.choice(words.SORTS[other])))
    questions = ("Which is a {q}, {o}?", "Which of the two is a {q}: {o}?")
    return Scene(questions, (one, other), options, NOUNS)


KINDS: tuple[Callable[[random.Random], Scene], ...] = (
    size,
    speed,
    heat,
    month,
    letter,
    number,
    sort,
)


def twins(rng: random.Random, kind: str, scene: Scene) -> tuple[Row, Row]:
    """The two rows of a scene: same opening, same options, same wordings, opposite questions."""
    question = rng.choice(scene.questions)
    options = " or ".join(rng.sample(scene.options, 2))
    opening = rng.choice(OPENINGS).format(n=rng.choice(words.NAMES)) + " "
    prompt = (opening if rng.random() < 0.5 else "") + question
    right, wrong = rng.randrange(3), rng.randrange(3)

    def row(asked: int, chosen: int, rejected: int) -> Row:
        ask = scene.asks[asked]
        return {
            "kind": kind,
            "prompt": _message("user", prompt.format(q=ask, o=options)),
            "chosen": _message(
                "assistant", _sentence(scene.wordings[chosen], ask, scene.options[asked])
            ),
            "rejected": _message(
                "assistant", _sentence(scene.wordings[rejected], ask, scene.options[1 - asked])
            ),
        }

    return row(0, right, wrong), row(1, wrong, right)


def _sentence(wording: str, ask: str, option: str) -> str:
    text = wording.format(q=ask, o=option)
    return text[0].upper() + text[1:]


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _question_of(row: Row) -> str:
    prompt = row["prompt"]
    assert isinstance(prompt, list)
    return prompt[0]["content"]


def generate(seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """Train and held-out rows, shuffled; a seed always gives the same.

    No question is asked twice, and no two options that are compared in a held-out question are
    compared in a train one.
    """
    rng = random.Random(seed)
    asked: set[str] = set()
    kept: set[frozenset[str]] = set()  # options of the held-out questions
    splits = []
    for held_out, num_pairs in ((True, HELDOUT_PAIRS), (False, TRAIN_PAIRS)):
        rows: list[Row] = []
        for kind in KINDS:
            wanted = len(rows) + num_pairs // len(KINDS)
            while len(rows) < wanted:
                scene = kind(rng)
                pair = twins(rng, kind.__name__, scene)
                questions = {_question_of(row) for row in pair}
                if frozenset(scene.options) in kept or not asked.isdisjoint(questions):
                    continue
                asked |= questions
                rows.extend(pair)
                if held_out:
                    kept.add(frozenset(scene.options))
        rng.shuffle(rows)
        splits.append(rows)
    return splits[1], splits[0]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the demo's preference set as JSON lines.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED, help="another seed, another set")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(FILES, generate(args.seed), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / name).write_text(text, encoding="utf-8")
        print(f"{args.out / name}: {len(rows)} pairs")


if __name__ == "__main__":
    main()
