"""The plan of groups: literal plans, and what must hold for any lengths."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.functional.groups import Group, one_group, plan_groups
from tests.functional.cases import borders

lengths = st.lists(st.integers(0, 9), min_size=0, max_size=12).map(lambda half: half * 2)


def test_literal_plan():
    # pairs of 5 + 2, 1 + 1, 3 + 3 tokens
    groups = plan_groups(borders([5, 1, 3, 2, 1, 3]).tolist(), 9)
    assert groups == [
        Group(0, 2, slice(0, 6), slice(9, 12)),
        Group(2, 3, slice(6, 9), slice(12, 15)),
    ]


def test_groups_are_of_about_equal_size():
    groups = plan_groups(borders([1] * 20).tolist(), 18)
    assert [g.rows for g in groups] == [10, 10]  # not 18 and 2


def test_pairs_too_long_for_the_workspace_are_groups_apart():
    groups = plan_groups(borders([1, 50, 1, 1, 50, 1]).tolist(), 10)
    assert [(g.start, g.stop) for g in groups] == [(0, 1), (1, 2), (2, 3)]
    groups = plan_groups(borders([1, 50, 50, 1, 1, 50, 50, 1]).tolist(), 10)
    assert [(g.start, g.stop) for g in groups] == [(0, 1), (1, 3), (3, 4)]
    groups = plan_groups(borders([1, 50, 50, 1, 1, 50, 50, 1]).tolist(), 10, join_long=False)
    assert [(g.start, g.stop) for g in groups] == [(0, 1), (1, 2), (2, 3), (3, 4)]


@given(lengths, st.integers(0, 40))
def test_every_pair_once_and_no_group_larger_than_allowed(lens, limit):
    cu = borders(lens)
    pairs, rows = len(lens) // 2, sum(lens)
    groups = plan_groups(cu.tolist(), limit)
    assert [p for g in groups for p in range(g.start, g.stop)] == list(range(pairs))
    values = torch.arange(rows)
    back = torch.full((rows,), -1)
    for group in groups:
        pairs_of = [lens[p] + lens[pairs + p] for p in range(group.start, group.stop)]
        assert group.rows <= limit or all(size > limit for size in pairs_of)
        taken = group.take(values)
        own = group.borders(cu)
        assert own[0] == 0 and own[-1] == group.rows == len(taken)
        order = [*range(group.start, group.stop), *range(pairs + group.start, pairs + group.stop)]
        for i, sequence in enumerate(order):
            expected = values[cu[sequence] : cu[sequence + 1]]
            assert torch.equal(taken[own[i] : own[i + 1]], expected)
        group.put(back, taken)
    assert torch.equal(back, values)


@given(lengths)
def test_one_group_is_everything_in_place(lens):
    cu = borders(lens)
    (group,) = one_group(len(lens) // 2, sum(lens))
    values = torch.arange(sum(lens))
    assert torch.equal(group.take(values), values)
    assert group.borders(cu) is cu
