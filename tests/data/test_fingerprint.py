"""The tokenizer's fingerprint changes with its token ids and with nothing else."""

import pytest

from dpo_fast.data.fingerprint import tokenizer_fingerprint
from tests.tiny import tiny_tokenizer


def test_equal_tokenizers_have_equal_fingerprints(tmp_path):
    first = tokenizer_fingerprint(tiny_tokenizer())
    assert tokenizer_fingerprint(tiny_tokenizer()) == first
    used = tiny_tokenizer()
    used(["a b", "c"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(used) == first
    assert tokenizer_fingerprint(tiny_tokenizer(padding_side="left")) == first


def test_a_saved_tokenizer_keeps_its_fingerprint(tmp_path):
    from transformers import AutoTokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "a")
    tiny_tokenizer().save_pretrained(tmp_path / "b")
    loaded = [AutoTokenizer.from_pretrained(tmp_path / name) for name in "ab"]
    assert tokenizer_fingerprint(loaded[0]) == tokenizer_fingerprint(loaded[1])


def test_what_changes_token_ids_changes_it():
    def changed(change) -> str:
        tokenizer = tiny_tokenizer()
        change(tokenizer)
        return tokenizer_fingerprint(tokenizer)

    def normalise(tokenizer) -> None:
        from tokenizers.normalizers import Lowercase

        tokenizer.backend_tokenizer.normalizer = Lowercase()

    seen = {
        changed(lambda t: None),
        changed(lambda t: setattr(t, "chat_template", t.chat_template + " ")),
        changed(lambda t: setattr(t, "chat_template", None)),
        changed(lambda t: setattr(t, "eos_token", "<|endoftext|>")),
        changed(lambda t: setattr(t, "split_special_tokens", True)),
        changed(lambda t: t.add_tokens(["copper coins"])),
        changed(normalise),
    }
    assert len(seen) == 7

    class Other(type(tiny_tokenizer())):
        pass

    other = Other(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    assert tokenizer_fingerprint(other) not in seen


def test_a_processor_counts_with_its_own_template():
    transformers = pytest.importorskip("transformers")

    def processor(template: str):
        return transformers.LlavaProcessor(
            image_processor=transformers.CLIPImageProcessor(),
            tokenizer=tiny_tokenizer(),
            image_token="<|endoftext|>",
            chat_template=template,
        )

    prints = [tokenizer_fingerprint(processor(template)) for template in ("a", "a", "b")]
    assert prints[0] == prints[1] != prints[2]
    assert prints[0] != tokenizer_fingerprint(tiny_tokenizer())


def test_a_tokenizer_without_a_rust_backend(tmp_path):
    from transformers import CanineTokenizer

    class Bytes(CanineTokenizer):
        pass

    first, second = (tokenizer_fingerprint(CanineTokenizer()) for _ in range(2))
    assert first == second
    assert tokenizer_fingerprint(Bytes()) != first
    changed = CanineTokenizer()
    changed.add_tokens(["copper"])
    assert tokenizer_fingerprint(changed) != first
