"""Precomputed log-probs of data that come later, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset

from dpo_fast.reference import precomputed as precomputed_module
from dpo_fast.reference.cache import CacheError
from dpo_fast.reference.frozen import FrozenReference
from dpo_fast.reference.precomputed import PrecomputedReference
from dpo_fast.reference.scored import ScoredReference
from dpo_fast.reference.sources import ModelSource
from tests.reference.common import collator, perturb, plain_logps, token_rows
from tests.reference.precomputing import ROWS, columns, dataset, edited, how, of_policy
from tests.tiny import save_tiny, tiny_model

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
