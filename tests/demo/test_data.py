"""The shipped preference set: what the demo claims about it, checked on every row."""

import json
from collections import Counter

import pytest

from dpo_fast.demo.baselines import (
    BASELINES,
    bag_of_words_accuracy,
    first_named_accuracy,
    length_accuracy,
)
from dpo_fast.demo.checker import prefers, solve
from dpo_fast.demo.data import Pair, path_of, read_pairs
from dpo_fast.demo.generate import FILES, KINDS, generate

TRAIN, HELDOUT = read_pairs("train"), read_pairs("heldout")


def test_sizes_and_kinds():
    assert len(TRAIN) == 2100 and len(HELDOUT) == 280
    for pairs in (TRAIN, HELDOUT):
        counts = Counter(pair.kind for pair in pairs)
        assert set(counts) == {kind.__name__ for kind in KINDS}
        assert len(set(counts.values())) == 1


def test_shipped_files_are_what_the_script_writes():
    for name, rows in zip(FILES, generate(), strict=True):
        lines = path_of(name.removesuffix(".jsonl")).read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows


def test_another_seed_gives_another_set():
    assert generate(seed=1)[0] != generate(seed=0)[0]


@pytest.mark.parametrize("pairs", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_checker_agrees_with_every_pair(pairs):
    for pair in pairs:
        assert prefers(pair.prompt, pair.chosen), pair
        assert not prefers(pair.prompt, pair.rejected), pair


def test_heldout_asks_its_own_questions_about_its_own_options():
    assert not {p.prompt for p in TRAIN} & {p.prompt for p in HELDOUT}
    compared = [
        {frozenset((solution.right, solution.wrong)) for solution in map(_solve, pairs)}
        for pairs in (TRAIN, HELDOUT)
    ]
    assert not compared[0] & compared[1]


def test_no_question_twice():
    prompts = [pair.prompt for pair in [*TRAIN, *HELDOUT]]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_near_chance(name):
    assert 0.4 <= BASELINES[name](TRAIN, HELDOUT) <= 0.6


def test_every_option_is_right_as_often_as_wrong():
    for pairs in (TRAIN, HELDOUT):
        right = Counter(_solve(pair).right for pair in pairs)
        wrong = Counter(_solve(pair).wrong for pair in pairs)
        assert right == wrong


def test_every_wording_is_right_as_often_as_wrong():
    for pairs in (TRAIN, HELDOUT):
        assert _lengths(pairs, "chosen") == _lengths(pairs, "rejected")


def _solve(pair):
    return solve(pair.prompt)


def _lengths(pairs, field):
    """Number of words of an answer, by kind."""
    return Counter((pair.kind, len(getattr(pair, field).split())) for pair in pairs)


# -- the baselines see what there is to see --------------------------------------------------------


def _planted(change):
    return [change(pair) for pair in TRAIN[:400]], [change(pair) for pair in HELDOUT]


def test_length_baseline_finds_longer_answers_and_shorter_ones():
    longer = _planted(lambda p: p._replace(chosen=p.chosen + " Yes, that is so, I am sure."))
    shorter = _planted(lambda p: p._replace(rejected=p.rejected + " Yes, that is so, I am sure."))
    assert length_accuracy(*longer) == 1.0
    assert length_accuracy(*shorter) == 1.0


def test_bag_of_words_finds_a_marker_word():
    marked = _planted(lambda p: p._replace(chosen=p.chosen.replace("The", "Surely the")))
    share = sum("The" in p.chosen for p in HELDOUT) / len(HELDOUT)
    assert bag_of_words_accuracy(*marked) > 0.5 + 0.4 * share


def test_first_named_baseline_finds_order():
    first = [pair for pair in TRAIN if _solve(pair).right_is_named_first]
    assert first_named_accuracy(first, first) == 1.0


def test_a_tie_counts_half():
    pair = Pair("size", TRAIN[0].prompt, "same", "same")
    assert length_accuracy([pair], [pair]) == 0.5
    assert bag_of_words_accuracy([pair], [pair]) == 0.5
