"""The decoder layers of a causal LM, found by structure."""

from torch import nn

from dpo_fast.models.head import base_causal_lm


def layer_list(model: nn.Module) -> nn.ModuleList | None:
    """The outermost list of modules with most parameters of ``model`` (any wrapper), in the order
    in which they run; None where there is no list.
    """
    lists: list[nn.ModuleList] = []

    def collect(module: nn.Module) -> None:
        if isinstance(module, nn.ModuleList):
            lists.append(module)
            return
        for child in module.children():
            collect(child)

    collect(base_causal_lm(model))
    return max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=None)
