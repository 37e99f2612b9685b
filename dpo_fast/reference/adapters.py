"""What PEFT puts into a model: which tensors are an adapter's, and the model without them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from dpo_fast.models import base_causal_lm, is_peft_model
from dpo_fast.reference.fingerprint import model_fingerprint, relevant_settings

# LoRA initialisations that move a part of the base weight into the adapter (or quantise it), so
# that the base without the adapter is no longer the model that was loaded.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def active_adapters(policy: Any) -> list[str]:
    """Names of the adapters that take part in the forward."""
    names = policy.active_adapters
    return [names] if isinstance(names, str) else list(names)


def active_adapter_settings(model: Any) -> list[dict[str, Any]]:
    """The settings of the active adapters that change log-probs; empty for a model without PEFT."""
    if not is_peft_model(model):
        return []
    configs = model.peft_config
    return [relevant_settings(configs[name].to_dict()) for name in active_adapters(model)]


def changes_base(policy: Any) -> str | None:
    """Why the base without its fresh adapter is not the model that was loaded; None if it is."""
    for name in active_adapters(policy):
        config = policy.peft_config[name]
        init = str(getattr(config, "init_lora_weights", "")).lower()
        if init.startswith(_BASE_CHANGING_INITS):
            return f"init_lora_weights={init!r} moves a part of the base weights into the adapter"
        if getattr(config, "kasa_config", None) is not None:
            return "KaSA truncates the base weights"
        if str(getattr(config.peft_type, "value", config.peft_type)) == "OSF":
            return "OSF decomposes the base weights"
    return None


def refuse_adaption_prompt(policy: Any) -> None:
    """Raise ValueError for LLaMA-Adapter, which keeps a model's forward as it was before ours."""
    if any(policy.peft_config[name].is_adaption_prompt for name in active_adapters(policy)):
        raise ValueError(
            "Adaption prompts (peft.AdaptionPromptConfig, LLaMA-Adapter) are not supported: PEFT "
            "keeps the model's original forward, which returns logits. Use LoRA or prompt "
            "tuning."
        )


def owned_parameters(policy: Any) -> dict[str, str | None]:
    """Names (of ``policy.named_parameters()``) of tensors that adapters own, to the adapter's.

    None as the adapter's name: owned by all of them (prompt encoders of one model).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    owned: dict[str, str | None] = {}
    adapters = policy.peft_config.keys()
    for path, module in policy.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for kind in (*module.adapter_layer_names, *module.other_param_names):
                container = _attribute(module, kind)
                if isinstance(container, nn.Module):
                    prefix = f"{path}.{kind}" if path else kind
                    for leaf, _ in _tensors_of(container):
                        name = leaf.split(".")[0]
                        owned[f"{prefix}.{leaf}"] = name if name in adapters else None
    encoders = getattr(policy, "prompt_encoder", None)
    if encoders is not None:
        for leaf, _ in _tensors_of(encoders):
            owned[f"prompt_encoder.{leaf}"] = leaf.split(".")[0]
    return owned


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _attribute(module: Any, dotted: str) -> Any:
    try:
        return attrgetter(dotted)(module)
    except (
        AttributeError
    ):  # a kind that this layer does not have (lora_embedding_A of an odd layer)
        return None


class AdaptersOff:
    """Switches all adapters of a ``PeftModel`` off for a forward, and back to exactly what was.

    ``PeftModel.disable_adapter()`` recomputes the model's status and rewrites ``requires_grad``:
    23 ms both ways for 224 LoRA layers, and flags that the user has set are lost. Most layer types
    only read one flag; for those it is set directly (0.2 ms), for the others through PEFT, with
    the ``requires_grad`` flags restored.
    """

    def __init__(self, policy: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        self._policy = policy
        self._plain: list[Any] = []
        self._layers: list[Any] = []
        config = policy.peft_config[active_adapters(policy)[0]]
        # Their adapters are no layers of the model: PEFT replaces the forward.
        self._whole = bool(config.is_prompt_learning)
        for module in policy.modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                (self._plain if _reads_one_flag(module) else self._layers).append(module)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self._whole:
            with _requires_grad_kept(self._policy), self._policy.disable_adapter():
                yield
            return
        plain = [m for m in self._plain if not m.__dict__["_disable_adapters"]]
        layers = [m for m in self._layers if not m.disable_adapters]
        with _requires_grad_kept(*layers):
            for module in plain:
                module.__dict__["_disable_adapters"] = True
            for layer in layers:
                layer.enable_adapters(False)
            try:
                yield
            finally:
                for module in plain:
                    module.__dict__["_disable_adapters"] = False
                for layer in layers:
                    layer.enable_adapters(True)


def _reads_one_flag(layer: Any) -> bool:
    """Whether `disable_adapters` is the whole state of this layer, checked by trying."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inherited = {BaseTunerLayer.enable_adapters, AuxiliaryTrainingWrapper.enable_adapters}
    if type(layer).enable_adapters not in inherited:
        return False
    before = layer.__dict__.get("_disable_adapters")
    if before is None:
        return False
    layer.__dict__["_disable_adapters"] = not before
    follows = layer.disable_adapters is (not before)
    layer.__dict__["_disable_adapters"] = before
    return follows


@contextmanager
def _requires_grad_kept(*modules: nn.Module) -> Iterator[None]:
    flags = [(p, p.requires_grad) for m in modules for p in m.parameters()]
    try:
        yield
    finally:
        for param, flag in flags:
            if param.requires_grad != flag:
                param.requires_grad_(flag)


def adapter_fingerprint(
    policy: nn.Module, copies: Mapping[str, Tensor], *, adapters_off: bool
) -> str:
    """Digest of what answers: the base and, unless off, the adapters with ``copies`` as values.

    With the adapters off it equals the fingerprint of the same model without PEFT.
    """
    owned = owned_parameters(policy)
    active = set() if adapters_off else set(active_adapters(policy))
    lm = base_causal_lm(policy)
    lm_names = {id(tensor): name for name, tensor in _tensors_of(lm)}
    exclude: set[str] = set()
    rename: dict[str, str] = {}
    replace: dict[str, Tensor] = {}
    outside: dict[str, Tensor] = {}
    for name, tensor in _tensors_of(policy):
        lm_name = lm_names.get(id(tensor))
        owner = owned.get(name)
        idle = name in owned and owner not in active and (adapters_off or owner is not None)
        if idle and lm_name is not None:
            exclude.add(lm_name)
        elif lm_name is None:
            if not adapters_off and not idle:  # prompt encoders, vectors shared by layers
                outside[name] = copies.get(name, tensor)
        else:
            replace[lm_name] = copies.get(name, tensor)
            if name in owned:
                rename[lm_name] = ".".join(part for part in lm_name.split(".") if part != owner)
    return model_fingerprint(
        lm,
        exclude=exclude,
        replace=replace,
        rename=rename,
        extra=outside,
        settings=[] if adapters_off else active_adapter_settings(policy),
    )
