"""What may be given as a model: a folder, a name on the hub, or a causal LM. Checked before any
weight or data is read.
"""

from pathlib import Path
from typing import Any

from torch import nn

from dpo_fast.hub_names import local_name, looks_like_path
from dpo_fast.models.head import base_causal_lm, output_layer

_MODEL_FILES = ("config.json", "adapter_config.json")
# Arguments of from_pretrained that say where a config is read from.
_PLACE_ARGUMENTS = (
    "revision",
    "code_revision",
    "subfolder",
    "gguf_file",
    "token",
    "cache_dir",
    "local_files_only",
    "trust_remote_code",
)


def check_model(model: Any, what: str) -> None:
    """``model`` can be loaded, or is a causal LM.

    Args:
        what: how the message calls it, e.g. ``"ref_model"``.

    Raises:
        TypeError: neither a string nor a model of transformers or PEFT, or a wrapped one.
        ValueError: a path without a model; an encoder-decoder, or a model without an LM head.
    """
    if isinstance(model, str):
        return check_model_name(model, what)
    if not isinstance(model, nn.Module):
        hint = " Convert the path: str(path)." if isinstance(model, Path) else ""
        raise TypeError(
            f"{what} must be a folder or a hub name (str), or a causal LM of transformers, PEFT's "
            f"wrappers included; got {type(model).__name__}.{hint}"
        )
    if isinstance(getattr(model, "module", None), nn.Module):
        raise TypeError(
            f"{what} is wrapped in {type(model).__name__}: give the model inside ({what}.module); "
            "accelerate wraps it for several devices, one process each."
        )
    lm = base_causal_lm(model)
    if not hasattr(lm, "config") or not hasattr(lm, "get_output_embeddings"):
        raise TypeError(
            f"{what} is a {type(lm).__name__}, a bare torch module: its LM head cannot be found "
            "without transformers' config and get_output_embeddings(). Give a causal LM such as "
            "AutoModelForCausalLM loads."
        )
    refuse_encoder_decoder(lm.config, f"{what} ({type(lm).__name__})")
    output_layer(lm)


def check_model_name(name: str, what: str) -> None:
    """A folder must hold a model; what is no folder must look like a hub name.

    Raises:
        ValueError: neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in _MODEL_FILES):
            checkpoints = sorted(p.name for p in path.glob("checkpoint-*"))
            hint = f" Did you mean {path / checkpoints[-1]}?" if checkpoints else ""
            files = " or ".join(_MODEL_FILES)
            raise ValueError(f"{what}: the folder {name!r} holds no model (no {files}).{hint}")
    elif path.exists():
        raise ValueError(f"{what}: {name!r} is a file; give the folder that save_pretrained wrote.")
    elif looks_like_path(name):
        raise ValueError(
            f"{what}: there is no folder {name!r}. Give a folder that save_pretrained wrote, or a "
            "hub name ('name' or 'owner/name')."
        )


def is_adapter(name: str) -> bool:
    """Whether a folder holds an adapter to go on training, not a whole model."""
    folder = Path(name).expanduser()
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def check_config(name: str, what: str, **load: Any) -> None:
    """Read the config of a folder or hub name, which is small, before its weights.

    Args:
        load: arguments of ``from_pretrained``; those that say where the config is are used.

    Raises:
        ValueError: an encoder-decoder. OSError, ValueError, KeyError: of ``AutoConfig``.
    """
    from transformers import AutoConfig

    place = {key: load[key] for key in _PLACE_ARGUMENTS if key in load}
    config = AutoConfig.from_pretrained(local_name(name), **place)
    refuse_encoder_decoder(config, f"{what} ({name!r})")


def refuse_encoder_decoder(config: Any, what: str) -> None:
    """A prompt that an encoder reads is not part of the scored sequence.

    Raises:
        ValueError: ``config`` is an encoder-decoder's.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{what} is an encoder-decoder (model_type {config.model_type!r}), which dpo_fast does "
            "not train: it scores prompt and answer as one sequence. Give a causal LM "
            "(decoder-only), or train this one with a trainer for encoder-decoders."
        )
