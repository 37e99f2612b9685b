"""A step that runs out of memory says what to change; torch's error type stays."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_fast.out_of_memory import OutOfMemory, is_out_of_memory
from dpo_fast.reference.scored import ScoredReference
from dpo_fast.trainer.objective import Objective
from tests.faults.jobs import trainer_of

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")
HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


def fails_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("error", [CUDA, HOST, MemoryError("numpy: Unable to allocate 7 GiB")])
def test_the_message_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    trainer = trainer_of("frozen", tmp_path, save_strategy="no", batch_layout="padded")
    fails_in(monkeypatch, Objective, "__call__", error)
    with pytest.raises(OutOfMemory) as caught:
        trainer.train()
    text = str(caught.value)
    assert text.startswith(str(error)) and "Out of memory in step 1" in text
    assert "4 pairs, " in text and "1. batch_layout='auto'" in text
    assert "2. reference='precomputed'" in text
    assert "3. per_device_train_batch_size=2, gradient_accumulation_steps=2" in text
    assert isinstance(caught.value, torch.cuda.OutOfMemoryError)


def test_the_optimizers_first_step_counts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of("precomputed", tmp_path, save_strategy="no")
    fails_in(monkeypatch, torch.optim.AdamW, "step", CUDA)
    with pytest.raises(OutOfMemory, match=r"(?s)step 1.*1\. per_device_train_batch_size=2"):
        trainer.train()


def test_a_real_allocation_that_is_too_large(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = trainer_of("adapter", tmp_path, save_strategy="no")
    real = Objective.__call__

    def greedy(*args: Any, **kwargs: Any) -> Any:
        torch.empty(2**60, dtype=torch.uint8)
        return real(*args, **kwargs)

    monkeypatch.setattr(Objective, "__call__", greedy)
    with pytest.raises(OutOfMemory, match="can't allocate memory"):
        trainer.train()


def test_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of("adapter", tmp_path, save_strategy="no")
    fails_in(monkeypatch, Objective, "__call__", RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match=r"^shapes differ$") as caught:
        trainer.train()
    assert not is_out_of_memory(caught.value)


def test_auto_find_batch_size_still_sees_torchs_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of("adapter", tmp_path, save_strategy="no", auto_find_batch_size=True)
    real, sizes = Objective.__call__, []

    def small_only(self: Any, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(batch["pair_index"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB")
        return real(self, model, batch, *args, **kwargs)

    monkeypatch.setattr(Objective, "__call__", small_only)
    trainer.train()
    assert sizes[0] == 4 and set(sizes[-5:]) <= {1, 2, 3}


def test_a_reference_pass_names_its_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_in(monkeypatch, ScoredReference, "token_logps", CUDA)
    with pytest.raises(OutOfMemory, match=r"(?s)4 pairs, .*precompute_ref_batch_size=2"):
        trainer_of("precomputed", tmp_path)
