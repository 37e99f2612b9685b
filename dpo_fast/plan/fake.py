"""A model of any size without its weights, as its training would hold it.

Fake tensors have shape, dtype and device and no memory; everything that the model's class does to
them, autograd included, runs as it would on real ones.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo_fast.models import base_causal_lm, install_scoring
from dpo_fast.plan.setting import Setting


class FakeModel:
    """The policy of a plan: a causal LM (with LoRA or all weights trained) on fake tensors.

    Args:
        config: of a causal LM.
        setting: its ``kind`` and ``precision`` count.
        lora: a ``peft.LoraConfig``, used where the kind is "lora".

    Raises:
        ValueError: the config is of a quantised checkpoint or of no causal LM.
    """

    def __init__(self, config: Any, setting: Setting, lora: Any) -> None:
        from transformers import AutoModelForCausalLM

        from dpo_fast.trainer.setup import disable_dropout

        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                "the checkpoint is quantised, and a plan knows bf16 and float32 weights only: plan "
                "with the config of the unquantised model (its weights are the larger part)"
            )
        self.setting = setting
        self.mode = FakeTensorMode()
        # Made on the meta device: modules cannot be moved or cast while their tensors are fake.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=setting.weight_dtype)
            if setting.kind == "lora":
                from peft import get_peft_model

                model = get_peft_model(model, lora)
        disable_dropout(model)
        install_scoring(model)
        self.module: nn.Module = model
        self._place()

    def _place(self) -> None:
        """Meta tensors to fake ones of the CPU, which autocast and attention treat as real."""
        fakes: dict[int, Tensor] = {}  # tied tensors stay one

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in fakes:
                with self.mode:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                fakes[id(tensor)] = new
            return fakes[id(tensor)]

        for module in self.module.modules():
            tables: tuple[dict[str, Any], ...] = (
                module._parameters,
                module._buffers,
                module.__dict__,
            )
            for table in tables:
                for name, value in table.items():
                    if isinstance(value, Tensor):
                        table[name] = fake(value)

    def set_checkpointing(self, on: bool) -> None:
        """As the trainer sets it; an adapter's inputs then need gradients."""
        lm: Any = base_causal_lm(self.module)
        with warnings.catch_warnings():
            # Names that every transformers from 5.17 on has; 5.23 says activation_checkpointing.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*is deprecated")
            if not on:
                lm.gradient_checkpointing_disable()
                return
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if self.setting.kind == "lora":
                lm.enable_input_require_grads()

    def tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers."""
        yield from self.module.parameters()
        yield from self.module.buffers()

    def trained(self) -> list[nn.Parameter]:
        """Parameters that get a gradient."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def weight_bytes(self) -> int:
        """Of parameters and buffers, tied ones once."""
        sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self.tensors()}
        return sum(sizes.values())

    @property
    def trained_bytes(self) -> int:
        """Of the parameters that get a gradient: as many bytes of gradients, twice for AdamW."""
        return sum(p.nbytes for p in self.trained())

    @property
    def num_parameters(self) -> int:
        """All of them, LoRA's included."""
        return sum(p.numel() for p in self.module.parameters())

    def batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A collator's batch with fake tensors."""
        return {
            key: self.mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
