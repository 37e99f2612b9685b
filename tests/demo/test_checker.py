"""The checker: what it accepts as right, and what it refuses to judge."""

import pytest

from dpo_fast.demo.checker import prefers, solve

SIZE = "Hello! Which is smaller, the cup or the tent?"
LETTER = "Which letter comes first: T or A?"
SORT = "Which of the two is a metal: the gold or the owl?"
MONTH = "What is later in the year: May or October?"
NUMBER = "Quiz time for Ben. Which number is higher, 9 or 21?"


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (SIZE, "The smaller one is the cup."),
        (SIZE, "Smaller? That is the cup."),
        (SIZE, "the smaller of the two is the cup"),
        (LETTER, "The first one is A."),
        (SORT, "A metal? That is the gold."),
        (MONTH, "The later of the two is October."),
        (NUMBER, "The higher one is 21."),
    ],
)
def test_right(prompt, answer):
    assert prefers(prompt, answer)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (SIZE, "The smaller one is the tent."),  # the other option
        (SIZE, "The smaller one is the pea."),  # not asked about
        (SIZE, "The bigger one is the cup."),  # the opposite question
        (SIZE, "The smaller one is the cup. The smaller one is the tent."),  # both
        (SIZE, "The cup."),  # does not say what it is
        (SIZE, ""),
        (LETTER, "The first one is T."),
        (LETTER, "A first one."),  # an article is no letter
        (SORT, "A metal? That is the owl."),
        (MONTH, "The later of the two is May."),
        (NUMBER, "The higher one is 9."),
        (NUMBER, "The higher one is 2."),
    ],
)
def test_wrong(prompt, answer):
    assert not prefers(prompt, answer)


def test_solution_names_both_options():
    solution = solve(SIZE)
    assert solution == ("smaller", "cup", "tent", True)
    assert not solve(LETTER).right_is_named_first


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("What is the capital of France?", "no question of the quiz"),
        ("Which is smaller or bigger, the cup or the tent?", "no question of the quiz"),
        ("Which is smaller, the cup or the egg?", "has no answer"),  # of one class
        ("Which is smaller, the cup or the gold?", "'gold' cannot be smaller"),
        ("Which is a bird, the gold or the cup?", "has no answer"),
    ],
)
def test_refuses_what_it_cannot_decide(prompt, message):
    with pytest.raises(ValueError, match=message):
        solve(prompt)
