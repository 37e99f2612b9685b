"""A frozen model whose layers wait in host memory and are copied to the device one layer ahead.

On the device stay what belongs to no layer (embeddings, last norm, LM head) and two slots of the
size of the largest layer. While a layer computes from one slot, the next is copied into the other,
on CUDA from pinned memory and on a stream of its own; the last layer fetches the first again, for
the next forward. The values are the same bits, so the results are.

Memory on the device: root + 2 layers in place of the whole model (Llama-3-8B in bf16: 2.8 in place
of 15.0 GiB). Traffic: all layers once a forward, from the host.

Legend: L layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_fast.models import base_causal_lm
from dpo_fast.models.layers import layer_list
from dpo_fast.reference.estimate import size_text

_ALIGNMENT = 256  # bytes: what an allocation of its own would have had


class _Place(NamedTuple):
    """Where a parameter lies in the flat memory of its layer."""

    param: nn.Parameter
    start: int  # in elements of its dtype

    def of(self, flat: dict[torch.dtype, Tensor]) -> Tensor:
        stop = self.start + self.param.numel()
        return flat[self.param.dtype][self.start : stop].view(self.param.shape)


class _Layer:
    """One layer's parameters in host memory, flat by dtype."""

    def __init__(self, module: nn.Module, parameters: list[nn.Parameter], pin: bool) -> None:
        self.module = module
        sizes: dict[torch.dtype, int] = {}
        self.places = []
        for param in parameters:
            step = max(_ALIGNMENT // param.element_size(), 1)
            start = sizes.get(param.dtype, 0)
            self.places.append(_Place(param, start))
            sizes[param.dtype] = start + -(-param.numel() // step) * step
        self.host = {d: torch.empty(n, dtype=d, pin_memory=pin) for d, n in sizes.items()}
        for place in self.places:
            place.of(self.host).copy_(place.param.detach())

    def use(self, flat: dict[torch.dtype, Tensor]) -> None:
        """The layer's parameters are what ``flat`` holds."""
        for place in self.places:
            place.param.data = place.of(flat)


class _Slot:
    """Memory on the device for one layer, and which layer is in it."""

    def __init__(self, layers: list[_Layer], device: torch.device) -> None:
        sizes: dict[torch.dtype, int] = {}
        for layer in layers:
            for dtype, flat in layer.host.items():
                sizes[dtype] = max(sizes.get(dtype, 0), flat.numel())
        self.flat = {d: torch.empty(n, dtype=d, device=device) for d, n in sizes.items()}
        self.holds: int | None = None
        # on CUDA: when the copy into it is done, and when its last reader is
        self.copied = self.read = None
        if device.type == "cuda":
            self.copied, self.read = torch.cuda.Event(), torch.cuda.Event()
            # the allocator may have given memory that kernels of this stream still use
            self.read.record(torch.cuda.current_stream(device))

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self.flat.values())


class LayerStream:
    """Moves ``model`` so: layers to the host, the rest to ``device``; its forward brings them.

    The parameters of a layer are the host's outside of its forward: what reads them there (a
    fingerprint, a state dict) finds their values.

    Args:
        model: frozen, whole, with its parameters on the host or on ``device``.
        device: where it runs; a CPU runs the same copies without streams, and saves nothing.

    Raises:
        ValueError: the model cannot be streamed; with what could be done instead.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        blocks = decoder_layers(model)
        check_streamable(model, blocks)
        own = exclusive_parameters(model, blocks)
        streamed = {id(param) for parameters in own for param in parameters}
        pin = device.type == "cuda"
        with torch.no_grad():
            self.layers: list[_Layer] = []
            for module, parameters in zip(blocks, own, strict=True):
                self.layers.append(_Layer(module, parameters, pin))
                self.layers[-1].use(self.layers[-1].host)  # what it had is free before the next
            move_others(model, streamed, device)
        self.slots = [_Slot(self.layers, device) for _ in range(2)]
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        for number, layer in enumerate(self.layers):
            layer.module.register_forward_pre_hook(self._before(number), prepend=True)
            layer.module.register_forward_hook(self._after(number), always_call=True)

    @property
    def host_bytes(self) -> int:
        """Bytes of the layers in host memory."""
        return sum(flat.nbytes for layer in self.layers for flat in layer.host.values())

    @property
    def slot_bytes(self) -> int:
        """Bytes that stand on the device for them."""
        return sum(slot.nbytes for slot in self.slots)

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"ref_offload: {size_text(self.host_bytes)} of the reference's layers wait in host "
            f"memory; {size_text(self.slot_bytes)} on {self._device} stand for them."
        )

    def _before(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "A reference with ref_offload=True was run with gradients: its layers' memory "
                    "is used again before a backward could read it. Run it under torch.no_grad()."
                )
            slot = next((slot for slot in self.slots if slot.holds == number), None)
            if slot is None:
                slot = self.slots[0]
                self._fetch(number, slot)
            if slot.copied is not None:
                torch.cuda.current_stream(self._device).wait_event(slot.copied)
            self.layers[number].use(slot.flat)
            following = (number + 1) % len(self.layers)
            other = self.slots[1 - self.slots.index(slot)]
            if other.holds != following:
                self._fetch(following, other)

        return hook

    def _after(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            layer = self.layers[number]
            layer.use(layer.host)
            for slot in self.slots:
                if slot.holds == number and slot.read is not None:
                    slot.read.record(torch.cuda.current_stream(self._device))

        return hook

    def _fetch(self, number: int, slot: _Slot) -> None:
        """Copy a layer into ``slot``, as soon as what read there last is done."""
        slot.holds = number
        with self._on_the_side(slot):
            for dtype, host in self.layers[number].host.items():
                slot.flat[dtype][: host.numel()].copy_(host, non_blocking=True)

    @contextmanager
    def _on_the_side(self, slot: _Slot) -> Iterator[None]:
        if self._side is None or slot.read is None or slot.copied is None:
            yield
            return
        with torch.cuda.stream(self._side):
            self._side.wait_event(slot.read)
            yield
            slot.copied.record(self._side)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a causal LM in order: the outermost list of modules with most parameters.

    Raises:
        ValueError: there is none.
    """
    most = layer_list(model)
    if most is None or len(most) < 3:
        found = 0 if most is None else len(most)
        raise ValueError(
            f"ref_offload=True: {type(base_causal_lm(model)).__name__} has {found} layers in a "
            "list, two of which are on the device at a time, so that nothing would be saved: drop "
            "ref_offload."
        )
    return list(most)


def check_streamable(model: nn.Module, layers: list[nn.Module]) -> None:
    """Raise ValueError where weights are no plain memory of one device."""
    reason = None
    if len(getattr(model, "hf_device_map", None) or ()) > 1:
        reason = "is spread over devices (device_map)"
    for layer in layers:
        for param in layer.parameters():
            if hasattr(param, "placements"):
                reason = "is sharded (DTensor)"
            elif type(param) is not nn.Parameter or param.is_meta:
                reason = f"has weights of type {type(param).__name__} on {param.device}"
    if reason is not None:
        raise ValueError(
            f"ref_offload=True: the reference {reason}, and only plain weights can be copied layer "
            "by layer: drop ref_offload, or use reference='precomputed', which frees all of it."
        )


def exclusive_parameters(model: nn.Module, layers: list[nn.Module]) -> list[list[nn.Parameter]]:
    """Of each layer, the contiguous parameters that no other module shares."""
    owners: dict[int, set[int]] = {}
    inside = {id(m): number for number, layer in enumerate(layers) for m in layer.modules()}
    for module in model.modules():
        for param in module._parameters.values():
            owners.setdefault(id(param), set()).add(inside.get(id(module), -1))
    return [
        [p for p in layer.parameters() if owners[id(p)] == {number} and p.is_contiguous()]
        for number, layer in enumerate(layers)
    ]


def move_others(model: nn.Module, streamed: set[int], device: torch.device) -> None:
    """Parameters that are not ``streamed``, and all buffers, to ``device``; tied ones stay tied."""
    for param in model.parameters():
        if id(param) not in streamed:
            param.data = param.data.to(device)
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved.setdefault(id(buffer), buffer.to(device))
