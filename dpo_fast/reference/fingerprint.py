"""Identity of a model: one digest over its weights, tensor by tensor, and its settings.

SHA-256 of the raw bytes (no copy to float32, no copy to the host of what is there already), in
pieces of 64 MiB over a few threads: about 2 GB/s a core with the processor's SHA instructions, so
a 7B model in bf16 takes 7 s on one core and one second on eight. Independent of thread count,
device, process, and of the modules that PEFT puts around the weights.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

PIECE_BYTES = 64 << 20

# Config entries that do not change a log-prob in eval mode: names and versions, generation and
# special tokens, what is returned and cached, terms of training, how (not what) attention computes.
_IRRELEVANT = frozenset(
    """
    _name_or_path name_or_path transformers_version architectures model_type_version
    torch_dtype dtype use_cache pad_token_id bos_token_id eos_token_id sep_token_id
    decoder_start_token_id id2label label2id num_labels problem_type task_specific_params
    tokenizer_class prefix return_dict output_attentions output_hidden_states
    output_router_logits router_aux_loss_coef router_jitter_noise router_z_loss_coef
    initializer_range initializer_factor gradient_checkpointing chunk_size_feed_forward
    _attn_implementation _attn_implementation_internal _experts_implementation
    _experts_implementation_internal attn_implementation _commit_hash auto_map
    base_model_name_or_path revision inference_mode peft_version init_lora_weights task_type
    auto_mapping
    """.split()
)


def digest_of(*parts: Any) -> str:
    """Hex SHA-256 of JSON-able values; the order of a dict's keys does not count."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_jsonable)
    return hashlib.sha256(text.encode()).hexdigest()


def _jsonable(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, torch.dtype):
        return str(value)
    if hasattr(value, "value"):  # an enum
        return value.value
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def relevant_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config that may change a log-prob, nested ones included.

    What is not known to be irrelevant counts, so that an unknown setting costs a cache miss and
    never a stale hit.
    """
    kept = {}
    for key, value in config.items():
        if key in _IRRELEVANT or key.endswith(("dropout", "_pdrop", "_dropout_prob")):
            continue
        if isinstance(value, Mapping):
            value = relevant_settings({str(k): v for k, v in value.items()})
        kept[key] = value
    return kept


def fingerprint_tensors(tensors: Mapping[str, Tensor], *, threads: int | None = None) -> str:
    """Hex digest over names, dtypes, shapes and bytes of ``tensors``, in any order of insertion.

    Args:
        tensors: whole tensors on any device; tensor subclasses (quantised weights) are taken apart.
        threads: default the machine's cores, at most 16.

    Raises:
        ValueError: a tensor on the meta device, or one that is sharded; names it.
    """
    threads = threads or min(16, os.cpu_count() or 1)
    entries: list[tuple[str, list[bytes]]] = []
    with ThreadPoolExecutor(threads) as pool:
        for name in sorted(tensors):
            for label, plain in _plain_tensors(name, tensors[name]):
                header = f"{label}|{plain.dtype}|{tuple(plain.shape)}"
                entries.append((header, _piece_digests(plain, pool, threads)))
    total = hashlib.sha256()
    for header, digests in entries:
        total.update(hashlib.sha256(header.encode() + b"".join(digests)).digest())
    return total.hexdigest()


def _piece_digests(tensor: Tensor, pool: ThreadPoolExecutor, threads: int) -> list[bytes]:
    pieces = _pieces(tensor)
    digests: list[bytes] = []
    while batch := list(islice(pieces, 2 * threads)):  # bounds what is copied from a GPU at a time
        digests += pool.map(lambda piece: hashlib.sha256(piece.numpy()).digest(), batch)
    return digests


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Bytes on the host, a piece at a time."""
    flat = tensor.contiguous().reshape(-1)
    step = max(1, PIECE_BYTES // max(1, flat.element_size()))
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu().view(torch.uint8)


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """``tensor`` itself, or the plain tensors that a tensor subclass is made of."""
    if tensor.is_meta:
        raise ValueError(
            f"{name!r} is on the meta device and has no values to identify it by: load the "
            "weights first."
        )
    if hasattr(tensor, "placements") or hasattr(tensor, "ds_id"):
        raise ValueError(
            f"{name!r} is sharded over ranks: take the fingerprint before the model is sharded."
        )
    if hasattr(tensor, "__tensor_flatten__"):
        inner, context = tensor.__tensor_flatten__()
        yield f"{name}|{type(tensor).__name__}|{context}", torch.empty(0)
        for attribute in inner:
            yield from _plain_tensors(f"{name}.{attribute}", getattr(tensor, attribute))
        return
    yield name, tensor.detach()


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, persistent buffers, and the scales that bitsandbytes keeps beside its parameters.

    A tied weight comes once.
    """
    for name, param in module.named_parameters():
        yield name, param
        yield from _bitsandbytes_state(name, param)
    yield from persistent_buffers(module)


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds; the others follow from the config."""
    for prefix, sub in module.named_modules():
        for leaf, buffer in sub.named_buffers(prefix=prefix, recurse=False):
            if leaf.rpartition(".")[2] not in sub._non_persistent_buffers_set:
                yield leaf, buffer


def _bitsandbytes_state(name: str, param: nn.Parameter) -> Iterable[tuple[str, Tensor]]:
    state = getattr(param, "quant_state", None)
    if state is not None:
        return [(f"{name}.{k}", v) for k, v in state.as_dict(packed=True).items()]
    scales = getattr(param, "SCB", None)
    return [] if scales is None else [(f"{name}.SCB", scales)]


# Modules that PEFT puts around a layer; the weight inside is the layer's own.
_WRAPPERS = frozenset({"base_layer", "original_module", "token_adapter"})


def model_fingerprint(
    model: nn.Module,
    *,
    exclude: Iterable[str] = (),
    replace: Mapping[str, Tensor] | None = None,
    rename: Mapping[str, str] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    settings: Any = (),
) -> str:
    """Digest of a causal LM: ``<weights, 40 hex digits>-<class, config and settings, 16>``.

    A model below an adapter that is excluded has the fingerprint of the same model without one.

    Args:
        model: without the wrappers of PEFT or DDP.
        exclude: parameter names that do not answer (adapters that are off).
        replace: values that count instead of the ones in the model.
        rename: names that count instead of the model's (without an adapter's arbitrary name).
        extra: further tensors that answer (a prompt encoder).
        settings: further JSON-able values that change log-probs (an adapter's config).
    """
    left_out, replace, rename = set(exclude), replace or {}, rename or {}
    tensors: dict[str, Tensor] = dict(extra or {})
    for name, tensor in named_weights(model):
        if name not in left_out:
            shown = rename.get(name, name)
            plain = ".".join(part for part in shown.split(".") if part not in _WRAPPERS)
            tensors[plain] = replace.get(name, tensor)
    config = relevant_settings(model.config.to_dict())  # type: ignore[operator, union-attr]
    about = digest_of(type(model).__name__, config, settings)
    return f"{fingerprint_tensors(tensors)[:40]}-{about[:16]}"
