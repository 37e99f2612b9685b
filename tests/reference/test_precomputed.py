"""Log-probs computed once: the same as online, found again by whoever may, and by nobody else."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset

from dpo_fast.data.collate import DataCollatorForPreference
from dpo_fast.reference.adapter import AdapterReference
from dpo_fast.reference.frozen import FrozenReference
from dpo_fast.reference.precompute import plan_batches, shares
from dpo_fast.reference.precomputed import PrecomputedReference
from dpo_fast.reference.rows import row_keys
from dpo_fast.reference.scored import ScoredReference, Scoring
from dpo_fast.reference.sources import AdapterSource, ModelSource
from tests.reference.common import collator, perturb, plain_logps, token_rows
from tests.reference.precomputing import ROWS, columns, dataset, edited, how, of_policy
from tests.tiny import tiny_model


@pytest.mark.parametrize("max_length", [None, 14])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.4])
def test_equal_to_the_model_itself(tmp_path: Path, alpha: Any, max_length: Any) -> None:
    model = tiny_model()
    reference = of_policy(tmp_path, model, scoring=Scoring(ld_alpha=alpha), max_length=max_length)
    data = reference.attach(dataset())
    assert data.column_names[-2:] == ["ref_chosen_logps", "ref_rejected_logps"]
    assert str(data.features["ref_chosen_logps"]) == "Value('float32')"
    batch = collator(max_length)([data[i] for i in range(ROWS)])
    expected = plain_logps(model, batch, ld_alpha=alpha)
    got = reference.logps(batch)
    assert got.dtype == torch.float32 and reference.hidden(batch) is None
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("fresh", [True, False])
def test_an_adapter_policy_is_its_own_source_even_in_training(tmp_path: Path, fresh: bool) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    policy = peft.get_peft_model(tiny_model(), config)
    if not fresh:
        perturb(policy)
    batch = collator(14)(token_rows(ROWS))
    expected = plain_logps(policy, batch)
    source = AdapterSource(AdapterReference(policy, fresh=fresh))
    reference = PrecomputedReference(source, how(), None, tmp_path)
    reference.release()
    perturb(policy, seed=2)
    data = reference.attach(dataset())
    torch.testing.assert_close(
        torch.from_numpy(columns(data)).flatten().double(), expected, rtol=2e-6, atol=2e-5
    )


# -- the key
# -----------------------------------------------------------------------------------------


MISSES: dict[str, Callable[[Path], PrecomputedReference]] = {
    "weights": lambda p: of_policy(p, edited(tiny_model())),
    "weight dtype": lambda p: of_policy(p, tiny_model().to(torch.bfloat16)),
    "model config": lambda p: of_policy(p, tiny_model(rms_norm_eps=1e-2)),
    "head setting": lambda p: of_policy(p, tiny_model("gemma2", final_logit_softcapping=6.0)),
    "autocast": lambda p: of_policy(p, scoring=Scoring(autocast_dtype=torch.bfloat16)),
    "max_length": lambda p: of_policy(p, max_length=9),
    "no max_length": lambda p: of_policy(p, max_length=None),
    "truncation_mode": lambda p: of_policy(p, collator=collator(14, truncation_mode="keep_end")),
}

HITS: dict[str, Callable[[Path], PrecomputedReference]] = {
    "nothing": of_policy,
    "batch size": lambda p: of_policy(p, batch_size=7),
    "ld_alpha": lambda p: of_policy(p, scoring=Scoring(ld_alpha=0.3)),
    "padding": lambda p: of_policy(p, collator=collator(14, pad_to_multiple_of=8)),
    "part size": lambda p: of_policy(p, part_rows=3),
    "attention": lambda p: of_policy(p, tiny_model(attn_implementation="eager")),
    "dropout": lambda p: of_policy(p, tiny_model(attention_dropout=0.3)),
    "train mode": lambda p: of_policy(p, tiny_model().train()),
    "name": lambda p: of_policy(p, named(tiny_model())),
    "a given model": lambda p: PrecomputedReference(
        ModelSource(FrozenReference(tiny_model(), tiny_model(seed=1))), how(), None, p
    ),
    "a new adapter": lambda p: PrecomputedReference(
        AdapterSource(AdapterReference(with_adapter(tiny_model()), fresh=True)), how(), None, p
    ),
}


def named(model: Any) -> Any:
    model.config._name_or_path = "/somewhere/else"
    return model


def with_adapter(model: Any) -> Any:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("change", MISSES)
def test_what_changes_the_values_misses(tmp_path: Path, change: str, forwards: Any) -> None:
    before = of_policy(tmp_path).attach(dataset())
    done = len(forwards)
    other = MISSES[change](tmp_path)
    after = other.attach(dataset())
    assert sum(forwards[done:]) == other.computed == ROWS
    assert (columns(before) != columns(after)).any()


@pytest.mark.parametrize("change", HITS)
def test_what_does_not_hits(tmp_path: Path, change: str, forwards: Any) -> None:
    of_policy(tmp_path).attach(dataset())
    done = len(forwards)
    other = HITS[change](tmp_path)
    after = other.attach(dataset())
    assert not forwards[done:] and other.computed == 0
    if change not in ("ld_alpha",):
        assert (columns(after) == columns(of_policy(tmp_path).attach(dataset()))).all()


def test_a_sweep_computes_once(tmp_path: Path, forwards: list[int]) -> None:
    """Other learning rates, folders and seeds are other processes with the same key and rows."""
    values = columns(of_policy(tmp_path).attach(dataset()))
    for _ in range(3):
        assert (columns(of_policy(tmp_path).attach(dataset())) == values).all()
    assert sum(forwards) == ROWS


def test_rows_are_found_wherever_they_are(tmp_path: Path, forwards: list[int]) -> None:
    reference = of_policy(tmp_path)
    data = reference.attach(dataset())
    order = np.random.default_rng(0).permutation(ROWS)[:15]
    part = reference.attach(dataset().select(order))
    assert (columns(part) == columns(data)[:, order]).all() and sum(forwards) == ROWS
    grown = Dataset.from_list(token_rows(ROWS) + token_rows(5, seed=7) + token_rows(2))
    again = reference.attach(grown)
    assert sum(forwards) == ROWS + 5
    assert (columns(again)[:, :ROWS] == columns(data)).all()
    assert (columns(again)[:, -2:] == columns(data)[:, :2]).all()


def test_rows_that_differ_only_in_where_the_answer_starts_are_two(tmp_path: Path) -> None:
    rows = [
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10]},
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]},
        {"prompt_ids": [5, 6, 7], "chosen_ids": [10], "rejected_ids": [8, 9]},
    ]
    keys = row_keys(Dataset.from_list(rows), collator())
    assert len({d.tobytes() for d in keys.digests}) == 3


def test_length_weights_come_from_the_stored_sums(tmp_path: Path, forwards: list[int]) -> None:
    model = tiny_model()
    of_policy(tmp_path, model).attach(dataset())
    for alpha in (0.0, 0.25, 1.0):
        reference = of_policy(tmp_path, model, scoring=Scoring(ld_alpha=alpha))
        data = reference.attach(dataset())
        expected = plain_logps(model, collator(14)(token_rows(ROWS)), ld_alpha=alpha)
        got = torch.from_numpy(columns(data)).flatten().double()
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-5)
    assert sum(forwards) == ROWS


def test_another_persons_collator_is_asked_what_it_shows(tmp_path: Path, forwards: Any) -> None:
    class Cut(DataCollatorForPreference):
        keep = 4

        def __call__(self, examples: Any) -> Any:
            return super().__call__(
                [{k: v[: self.keep] for k, v in e.items() if k.endswith("_ids")} for e in examples]
            )

    from dpo_fast.batch import PlannedCollator

    cut = PlannedCollator(Cut(pad_token_id=0))
    first = of_policy(tmp_path, collator=cut).attach(dataset())
    assert sum(forwards) == ROWS
    of_policy(tmp_path, collator=cut).attach(dataset())
    assert sum(forwards) == ROWS
    cut.collator.keep = 3
    second = of_policy(tmp_path, collator=cut).attach(dataset())
    assert sum(forwards) > ROWS and (columns(first) != columns(second)).any()


# -- the loop
# ----------------------------------------------------------------------------------------


def test_batches_hold_every_distinct_row_once_longest_first() -> None:
    data = Dataset.from_list(token_rows(ROWS) + token_rows(4))
    keys = row_keys(data, collator())
    batches = plan_batches(keys, 4)
    assert [len(b) for b in batches] == [4, 4, 4, 4, 4, 3]
    lengths = [int(keys.lengths[i]) for b in batches for i in b]
    assert lengths == sorted(lengths, reverse=True)
    shuffled = data.shuffle(seed=1)
    other = row_keys(shuffled, collator())
    assert [{keys.digests[i].tobytes() for i in b} for b in batches] == [
        {other.digests[i].tobytes() for i in b} for b in plan_batches(other, 4)
    ]


def test_the_global_generators_do_not_move(tmp_path: Path, monkeypatch: Any) -> None:
    reference = of_policy(tmp_path)
    original = ScoredReference.token_logps

    def drawing(self: Any, batch: Any) -> torch.Tensor:
        random.random(), np.random.rand(), torch.rand(3)
        torch.manual_seed(5)
        return original(self, batch)

    monkeypatch.setattr(ScoredReference, "token_logps", drawing)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    reference.attach(dataset())
    assert reference.computed == ROWS
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_the_policy_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_model().train()
    reference = of_policy(tmp_path, model)
    reference.attach(dataset())
    reference.release()
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_parts_are_written_as_the_work_goes_on(tmp_path: Path) -> None:
    reference = of_policy(tmp_path, part_rows=8)
    reference.attach(dataset())
    assert len(list(reference.cache().folder.glob("part-*"))) == 3


def test_an_interrupt_keeps_what_is_done_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: Any, forwards: list[int]
) -> None:
    whole = columns(of_policy(tmp_path / "whole").attach(dataset()))
    forwards.clear()
    original = ScoredReference.token_logps

    def interrupted(self: Any, batch: Any) -> torch.Tensor:
        if len(forwards) == 3:
            raise KeyboardInterrupt
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ScoredReference, "token_logps", interrupted)
        reference = of_policy(tmp_path / "cut")
        with pytest.raises(KeyboardInterrupt, match=r"12 of 23 rows are in .*Run the same command"):
            reference.attach(dataset())
    again = of_policy(tmp_path / "cut")
    values = columns(again.attach(dataset()))
    assert again.computed == ROWS - 12 and (values == whole).all()


def test_shares_differ_by_one_batch_at_most() -> None:
    tokens = sorted((int(1000 / (1 + i % 37)) for i in range(91)), reverse=True)
    for num_ranks in (1, 2, 3, 8, 200):
        split = shares(tokens, num_ranks)
        assert sorted(batch for share in split for batch in share) == list(range(91))
        loads = [sum(tokens[batch] for batch in share) for share in split]
        assert max(loads) - min(loads) <= tokens[0]
    assert shares([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]
    assert shares([], 2) == [[], []]


def test_jobs_of_a_sweep_that_start_together_share_the_work(
    tmp_path: Path, monkeypatch: Any, forwards: list[int]
) -> None:
    """Another job stores rows while this one runs; they are not computed again."""
    whole = columns(of_policy(tmp_path / "whole").attach(dataset()))
    mine = of_policy(tmp_path / "shared", part_rows=4)
    other = of_policy(tmp_path / "shared", part_rows=4).attach
    original = ScoredReference.token_logps
    started = []

    def with_another_job(self: Any, batch: Any) -> torch.Tensor:
        if not started:
            started.append(True)
            other(dataset().select(range(12)))
        return original(self, batch)

    monkeypatch.setattr(ScoredReference, "token_logps", with_another_job)
    data = mine.attach(dataset())
    assert 0 < mine.computed < ROWS and mine.cache().is_being_filled()
    torch.testing.assert_close(columns(data), whole, rtol=1e-6, atol=1e-6)
