"""Every named loss. What a loss needs and allows is declared on the function itself (traits)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from dpo_fast.losses.aot import aot, aot_unpaired
from dpo_fast.losses.apo import apo_down, apo_zero
from dpo_fast.losses.cpo import cpo
from dpo_fast.losses.discopop import discopop
from dpo_fast.losses.dpo import cdpo, hinge, ipo, robust, sigmoid, sigmoid_norm
from dpo_fast.losses.exo import exo_pair
from dpo_fast.losses.kto_pair import kto_pair
from dpo_fast.losses.nca_bco import bco_pair, nca_pair
from dpo_fast.losses.orpo import orpo
from dpo_fast.losses.output import LossOutput
from dpo_fast.losses.sft import sft
from dpo_fast.losses.simpo import simpo
from dpo_fast.losses.sppo import sppo_hard

# The names of TRL 1.16, then those that it does not have.
LOSSES: Mapping[str, Callable[..., LossOutput]] = MappingProxyType(
    {
        "sigmoid": sigmoid,
        "hinge": hinge,
        "ipo": ipo,
        "exo_pair": exo_pair,
        "nca_pair": nca_pair,
        "robust": robust,
        "bco_pair": bco_pair,
        "sppo_hard": sppo_hard,
        "aot": aot,
        "aot_unpaired": aot_unpaired,
        "apo_zero": apo_zero,
        "apo_down": apo_down,
        "discopop": discopop,
        "sft": sft,
        "sigmoid_norm": sigmoid_norm,
        "cdpo": cdpo,
        "simpo": simpo,
        "orpo": orpo,
        "cpo": cpo,
        "kto_pair": kto_pair,
    }
)
