"""Log-probs computed once: the same as online, found again by whoever may, and by nobody else."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset, IterableDataset

from dpo_fast.data.collate import DataCollatorForPreference
from dpo_fast.reference import precomputed as precomputed_module
from dpo_fast.reference.adapter import AdapterReference
from dpo_fast.reference.cache import CacheError
from dpo_fast.reference.frozen import FrozenReference
from dpo_fast.reference.precompute import Precompute, plan_batches, shares
from dpo_fast.reference.precomputed import PrecomputedReference
from dpo_fast.reference.rows import row_keys
from dpo_fast.reference.scored import ScoredReference, Scoring
from dpo_fast.reference.sources import AdapterSource, ModelSource, PolicySource
from tests.reference.common import collator, perturb, plain_logps, token_rows
from tests.tiny import save_tiny, tiny_model

ROWS = 23
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forwards(monkeypatch: Any) -> list[int]:
    """Pairs of each reference forward of the test."""
    seen: list[int] = []
    original = ScoredReference.token_logps

    def counted(self: ScoredReference, batch: Any) -> torch.Tensor:
        seen.append(len(batch["seq_lens"]) // 2)
        return original(self, batch)

    monkeypatch.setattr(ScoredReference, "token_logps", counted)
    return seen


def how(max_length: int | None = 14, batch_size: int = 4, **kwargs: Any) -> Precompute:
    collate = kwargs.pop("collator", None) or collator(max_length)
    return Precompute(collate, batch_size, CPU, **kwargs)


def of_policy(root: Path, model: Any = None, **kwargs: Any) -> PrecomputedReference:
    model = tiny_model() if model is None else model
    scoring = kwargs.pop("scoring", None)
    keep = kwargs.pop("keep", "auto")
    source = PolicySource(model, scoring, keep)
    return PrecomputedReference(source, how(**kwargs), scoring, root)


def dataset(n: int = ROWS, seed: int = 0) -> Dataset:
    return Dataset.from_list(token_rows(n, seed))


def columns(data: Dataset) -> np.ndarray:
    return np.stack([np.array(data[c]) for c in ("ref_chosen_logps", "ref_rejected_logps")])


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


def edited(model: Any) -> Any:
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    return model


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


# -- new data after training began
# -------------------------------------------------------------------


def test_new_data_before_training_costs_no_second_model(tmp_path: Path, monkeypatch: Any) -> None:
    model = tiny_model()
    reference = of_policy(tmp_path, model)
    reference.attach(dataset())
    reference.release()
    monkeypatch.setattr(reference.source, "_rebuilt", lambda: pytest.fail("a model was made"))
    reference.attach(dataset(5, seed=9))
    assert reference.computed == ROWS + 5


@pytest.mark.parametrize("keep", ["cpu", "path", "auto"])
def test_new_data_in_training_is_scored_by_the_initial_policy(tmp_path: Path, keep: Any) -> None:
    from transformers import AutoModelForCausalLM

    path = save_tiny(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if keep == "cpu":
        model.config._name_or_path = "/gone"
    expected = plain_logps(model, collator(14)(token_rows(5, seed=9)))
    reference = of_policy(tmp_path / "cache", model, keep=keep)
    reference.attach(dataset())
    reference.release()
    perturb(model)
    data = reference.attach(dataset(5, seed=9), "later")
    got = torch.from_numpy(columns(data)).flatten().double()
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-5)
    found = of_policy(tmp_path / "cache", AutoModelForCausalLM.from_pretrained(path))
    found.attach(dataset(5, seed=9))
    assert found.computed == 0


def test_known_data_in_training_needs_no_model(tmp_path: Path) -> None:
    model = tiny_model()
    reference = of_policy(tmp_path, model, keep="none")
    reference.attach(dataset())
    reference.release()
    perturb(model)
    reference.attach(dataset().shuffle(seed=3))
    with pytest.raises(ValueError, match=r"kept no reference: give the dataset.*ref_keep='auto'"):
        reference.attach(dataset(3, seed=8))


def test_a_path_that_is_not_the_model_any_more_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = save_tiny(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    edited(model)
    reference = of_policy(tmp_path / "cache", model)
    assert "to be loaded from" in reference.describe()
    reference.attach(dataset())
    reference.release()
    perturb(model)
    with pytest.raises(
        ValueError, match=r"is not the model that training started from.*ref_keep='cpu'"
    ):
        reference.attach(dataset(3, seed=8))
    with pytest.raises(ValueError, match="not loaded from a folder"):
        of_policy(tmp_path, tiny_model(), keep="path")


def test_a_given_model_is_kept_for_new_data(tmp_path: Path) -> None:
    policy, given = tiny_model(), tiny_model(seed=1)
    source = ModelSource(FrozenReference(given, policy))
    reference = PrecomputedReference(source, how(), None, tmp_path)
    reference.attach(dataset())
    reference.release()
    perturb(policy)
    expected = plain_logps(given, collator(14)(token_rows(4, seed=8)))
    got = torch.from_numpy(columns(reference.attach(dataset(4, seed=8)))).flatten().double()
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-5)


# -- bad input
# ---------------------------------------------------------------------------------------


def test_columns_of_unknown_origin_are_replaced(tmp_path: Path) -> None:
    reference = of_policy(tmp_path)
    good = reference.attach(dataset())
    wrong = dataset().add_column("ref_chosen_logps", [0.0] * ROWS)
    assert (columns(reference.attach(wrong)) == columns(good)).all()
    assert (columns(reference.attach(good)) == columns(good)).all()


def test_refusals(tmp_path: Path) -> None:
    reference = of_policy(tmp_path)
    stream = IterableDataset.from_generator(lambda: iter(token_rows(3)))
    with pytest.raises(
        ValueError, match=r"'valid' is a IterableDataset: load it without streaming"
    ):
        reference.attach(stream, "valid")
    with pytest.raises(ValueError, match=r"lacks \['rejected_ids'\].*prompt_ids"):
        reference.attach(dataset().remove_columns("rejected_ids"))
    with pytest.raises(ValueError, match="was not given to the precomputed reference"):
        reference.logps(collator()(token_rows(2)))
    with pytest.raises(ValueError, match="precompute_ref_batch_size=0"):
        how(batch_size=0)
    with pytest.raises(ValueError, match="reference='ema'"):
        reference.load_state_dict({"x": torch.zeros(1)})


def test_an_unwritable_cache_is_found_before_the_first_forward(
    tmp_path: Path, forwards: list[int]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="reference cache folder"):
        of_policy(tmp_path / "file").attach(dataset())
    assert not forwards


def test_a_damaged_cache_is_refused_before_the_first_forward(
    tmp_path: Path, forwards: list[int]
) -> None:
    reference = of_policy(tmp_path)
    reference.attach(dataset())
    part = next(reference.cache().folder.glob("part-*"))
    part.write_bytes(part.read_bytes()[:100])
    forwards.clear()
    with pytest.raises(CacheError, match="damaged"):
        of_policy(tmp_path).attach(dataset())
    assert not forwards
    part.unlink()  # the remedy
    assert of_policy(tmp_path).attach(dataset()) is not None


def test_nan_is_never_stored(tmp_path: Path, monkeypatch: Any) -> None:
    original = ScoredReference.token_logps

    def broken(self: Any, batch: Any) -> torch.Tensor:
        logps = original(self, batch)
        logps[3] = float("nan")
        return logps

    monkeypatch.setattr(ScoredReference, "token_logps", broken)
    reference = of_policy(tmp_path)
    with pytest.raises(ValueError, match=r"row \d+ .*NaN or infinite.*nothing of this part"):
        reference.attach(dataset())
    assert not list(tmp_path.rglob("part-*"))


def test_an_empty_dataset_gets_empty_columns(tmp_path: Path) -> None:
    data = of_policy(tmp_path).attach(dataset().select([]))
    assert len(data) == 0 and data.column_names[-1] == "ref_rejected_logps"


def test_fingerprints_of_datasets_do_not_depend_on_chance(tmp_path: Path) -> None:
    data = dataset()
    first, second = of_policy(tmp_path).attach(data), of_policy(tmp_path).attach(data)
    assert first._fingerprint == second._fingerprint != data._fingerprint
    assert precomputed_module.REF_COLUMNS == ("ref_chosen_logps", "ref_rejected_logps")
