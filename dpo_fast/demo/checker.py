"""Who is right: reads a question and decides it by the tables in `dpo_fast.demo.words`.

Shares nothing with the generator but those tables, so it proves every shipped pair, and judges what
a model writes.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from dpo_fast.demo import words

_OPTIONS = re.compile(r"[,:] (?:the )?(\w+) or (?:the )?(\w+)\?$")
_ASKED = re.compile(
    r"\b(smaller|bigger|slower|faster|colder|hotter|earlier|later|first|last|lower|higher"
    r"|bird|tool|drink|garment|plant|metal)\b"
)
# asked -> table from low to high, and whether the high end is meant
_RANKED: Mapping[str, tuple[Sequence[Sequence[str]], bool]] = {
    "smaller": (words.SIZES, False),
    "bigger": (words.SIZES, True),
    "slower": (words.SPEEDS, False),
    "faster": (words.SPEEDS, True),
    "colder": (words.HEATS, False),
    "hotter": (words.HEATS, True),
    "earlier": ([(month,) for month in words.MONTHS], False),
    "later": ([(month,) for month in words.MONTHS], True),
    "first": ([(letter,) for letter in words.LETTERS], False),
    "last": ([(letter,) for letter in words.LETTERS], True),
    "lower": ([(number,) for number in words.NUMBERS], False),
    "higher": ([(number,) for number in words.NUMBERS], True),
}


class Solution(NamedTuple):
    """``asked``: the property asked for; ``right`` and ``wrong``: the options, without "the"."""

    asked: str
    right: str
    wrong: str
    right_is_named_first: bool


def solve(prompt: str) -> Solution:
    """The solution of a question of the quiz.

    Raises:
        ValueError: the text is no such question, or neither option is the answer.
    """
    options, asked = _OPTIONS.search(prompt), _ASKED.findall(prompt)
    if options is None or len(asked) != 1:
        raise ValueError(f"{prompt!r} is no question of the quiz: one property, '... A or B?'.")
    first, second = options.groups()
    scores = _score(asked[0], first), _score(asked[0], second)
    if scores[0] == scores[1]:
        raise ValueError(f"{prompt!r} has no answer: both options are as {asked[0]} as the other.")
    right, wrong = (first, second) if scores[0] > scores[1] else (second, first)
    return Solution(asked[0], right, wrong, right is first)


def prefers(prompt: str, answer: str) -> bool:
    """Whether ``answer`` says what was asked for and names the right option, and only that one."""
    solution = solve(prompt)
    said = set(re.findall(r"\w+", answer))
    named = {word for word in said if word in _options() and word not in ("A", "I")}
    # the article "A" opens some sentences, so one-letter options count only at the end
    named |= set(re.findall(r"\b([A-Z])\b(?=\W*$)", answer))
    asked = {word.lower() for word in said} & {*_RANKED, *words.SORTS}
    return named == {solution.right} and asked == {solution.asked}


def _score(asked: str, option: str) -> int:
    if asked in words.SORTS:
        return int(option in words.SORTS[asked])
    table, high = _RANKED[asked]
    for rank, members in enumerate(table):
        if option in members:
            return rank if high else -rank
    raise ValueError(f"{option!r} cannot be {asked}: no such word in the quiz's table.")


@cache
def _options() -> frozenset[str]:
    tables = [members for table, _ in _RANKED.values() for members in table]
    return frozenset(word for members in [*tables, *words.SORTS.values()] for word in members)
