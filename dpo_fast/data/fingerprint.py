"""A fingerprint of everything in a tokenizer that changes token ids, and of nothing else.

Pickles of a tokenizer change when it is merely used (a call stores its padding and truncation in
the backend), which would make a cache miss for no reason.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from dpo_fast.data.tokenize import inner_tokenizer

# Raised when the same rows and tokenizer give other columns than before.
FORMAT_VERSION = 1


def tokenizer_fingerprint(processing_class: Any) -> str:
    """Hexadecimal digest of a tokenizer or processor.

    It covers the classes, vocabulary, merges, normalisation, pre- and post-processing, special and
    added tokens, and chat templates; not the padding, truncation, name or path.
    """
    tokenizer = inner_tokenizer(processing_class)
    parts = {
        "class": _class_name(tokenizer),
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "chat_template": getattr(tokenizer, "chat_template", None),
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", None),
        "state": _state(tokenizer),
    }
    if processing_class is not tokenizer:
        parts["processor"] = _class_name(processing_class)
        parts["processor_template"] = getattr(processing_class, "chat_template", None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _state(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _saved_files(tokenizer)
    state = json.loads(backend.to_str())
    return {key: value for key, value in state.items() if key not in ("padding", "truncation")}


def _saved_files(tokenizer: Any) -> dict[str, str]:
    """Digest of each file that saves a tokenizer without a Rust backend."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }
