"""Axolotl's DPO on dpo_fast's trainer, by one line of its YAML::

    rl: dpo
    trainer_cls: dpo_fast.integrations.axolotl.FastAxolotlDPOTrainer

Axolotl calls the class with model and reference, and keeps its own optimizers, schedulers, data
loading and tagging, which are mixins of ``AxolotlDPOTrainer``. (A plugin's ``get_trainer_cls``
would be called without the models: use ``trainer_cls``.) Its configuration is a ``trl.DPOConfig``
with more fields; options that only dpo_fast has are class attributes here, to be set in a subclass
of one's own::

    class Shared(FastAxolotlDPOTrainer):
        options = {"batch_layout": "shared_prefix", "reference": "precomputed"}

Known interface: Axolotl 0.19.0 (trl 1.9.0, transformers 5.16.1).
"""

from typing import Any, ClassVar

from torch import Tensor

from dpo_fast.config import DPOConfig
from dpo_fast.integrations.interface import InterfaceChanged
from dpo_fast.integrations.methods import import_peer, seen
from dpo_fast.integrations.trl_trainer import BelowTrl, TrlInterface, trl

_module = import_peer("axolotl.core.trainers.dpo.trainer", "axolotl", "pip install axolotl")
_Theirs: Any = getattr(_module, "AxolotlDPOTrainer", None)

if not (isinstance(_Theirs, type) and issubclass(_Theirs, trl.DPOTrainer)):
    raise InterfaceChanged(
        f"axolotl.core.trainers.dpo.trainer.AxolotlDPOTrainer of {seen('axolotl')} is "
        f"{_Theirs!r}, not a subclass of trl.DPOTrainer."
    )


class _BeforeAxolotl(_Theirs):
    """Stands before Axolotl's trainer in the order of classes."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Axolotl's, without the garbage collection and the emptied cache after every step."""
        return super(_Theirs, self).training_step(*args, **kwargs)


class FastAxolotlDPOTrainer(TrlInterface, _BeforeAxolotl, BelowTrl):  # type: ignore[misc]
    """``trainer_cls`` for Axolotl: its trainer's mixins around dpo_fast's step.

    Raises:
        ValueError, TypeError: as :class:`dpo_fast.Trainer`.
        InterfaceChanged: TRL's trainer has hooks that are not known, with the version.
    """

    # Axolotl pins this release; what Axolotl trains here was tested on it
    transformers_floor = "5.16"
    # fields of dpo_fast.DPOConfig, on top of what the YAML says
    options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        *,
        args: Any,
        precompute_ref_log_probs: bool | None = None,
        **kwargs: Any,
    ) -> None:
        config = DPOConfig.from_args(args)
        if config is not args:
            config.router_aux_loss_coef = _router_coef(model, config.router_aux_loss_coef)
        unknown = self.options.keys() - vars(config).keys()
        if unknown:
            raise ValueError(f"options has {sorted(unknown)}, which dpo_fast.DPOConfig does not.")
        for name, value in self.options.items():
            setattr(config, name, value)
        # Axolotl passes it to the trainer, too, where the YAML has it
        if precompute_ref_log_probs is not None:
            config.precompute_ref_log_probs = precompute_ref_log_probs
        config.validate()
        super().__init__(model, ref_model, args=config, **kwargs)


def _router_coef(model: Any, coef: float | None) -> float | None:
    """TRL 1.9's default is a number, which counts where the model is set to report its routers."""
    text = model.config.get_text_config()
    if not hasattr(text, "output_router_logits"):
        return None
    return coef if text.output_router_logits else 0.0
