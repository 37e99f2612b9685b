"""A DPO step on many GPUs, on paper: bytes on the wire, seconds of compute, closed form of both.

Nothing here is measured: it is a model, and ``WEAK_SCALING.md`` states what it assumes.

Legend: G GPUs, P parameters, L layers, H hidden, V vocabulary, N scored tokens, T tokens of a GPU's
micro-batch, K micro-batches of a step.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from dpo_fast.metrics import packed_numel

Engine = Literal["ddp", "fsdp2", "zero3", "tp8_fsdp2"]
Reference = Literal["frozen", "adapter", "precomputed", "ema"]
ENGINES: tuple[Engine, ...] = ("ddp", "fsdp2", "zero3", "tp8_fsdp2")
REFERENCES: tuple[Reference, ...] = ("frozen", "adapter", "precomputed", "ema")


@dataclass(frozen=True)
class Cluster:
    """H200 nodes. Bandwidths of one GPU in bytes/s and direction, as a collective gets them."""

    flops: float = 0.5 * 989e12  # dense bf16 peak times the share that a training step reaches
    gpus_per_node: int = 8
    nvlink: float = 0.8 * 450e9
    network: float = 0.85 * 50e9  # 400 Gb/s for each GPU
    latency_nvlink: float = 3e-6  # seconds a step of a ring
    latency_network: float = 8e-6
    memory: float = 141e9
    hbm: float = 4.3e12

    def gather_seconds(self, size: float, ranks: int, *, across: bool = False) -> float:
        """An all-gather (or reduce-scatter) whose whole result (input) has ``size`` bytes.

        Inside a node a ring. Over nodes every GPU talks to its like in the other nodes while the
        node's GPUs pass on what came: the slower of the two. ``across``: one rank a node (the
        node's other GPUs hold other shards), nothing over NVLink.
        """
        if ranks == 1:
            return 0.0
        local = 1 if across else min(ranks, self.gpus_per_node)
        nodes = ranks // local
        inside = size * (local - 1) / local / self.nvlink
        between = size / local * (nodes - 1) / nodes / self.network
        latency = (local - 1) * self.latency_nvlink + (nodes - 1) * self.latency_network
        return max(inside, between) + latency

    def reduce_seconds(self, size: float, ranks: int, *, across: bool = False) -> float:
        """An all-reduce: reduce-scatter and all-gather."""
        return 2 * self.gather_seconds(size, ranks, across=across)


@dataclass(frozen=True)
class Model:
    """A decoder: parameters by place."""

    name: str
    layers: int
    layer_params: float
    hidden: int
    vocab: int
    tied: bool = False

    @property
    def head_params(self) -> float:
        return float(self.hidden * self.vocab)

    @property
    def root_params(self) -> float:
        """Embeddings and head: outside of the layers."""
        return self.head_params * (1 if self.tied else 2)

    @property
    def params(self) -> float:
        return self.layers * self.layer_params + self.root_params


MODELS = (
    Model("Qwen3-0.6B", 28, 15.7e6, 1024, 151_936, tied=True),
    Model("Llama-3-8B", 32, 218.1e6, 4096, 128_256),
    Model("Llama-3-70B", 80, 855.7e6, 8192, 128_256),
)


@dataclass(frozen=True)
class Run:
    """What one GPU does in an optimizer step; with tensor parallelism, what eight do together per
    GPU.
    """

    reference: Reference = "frozen"
    tokens: int = 8192  # T: prompt and answers of a micro-batch
    length: int = 1024  # of a sequence, for attention
    scored: float = 0.5  # share of T that is answers
    micro_batches: int = 1
    recompute: bool = True  # gradient checkpointing
    lora_share: float = 0.01  # of the layers' parameters, with "adapter"
    gather_bytes: int = 2  # a gathered parameter: bf16
    reduce_bytes: int = 4  # a reduced gradient: float32
    logging_steps: int = 10
    ema_steps: int = 512

    @property
    def has_forward(self) -> bool:
        """The reference runs in every step."""
        return self.reference != "precomputed"

    @property
    def second_model(self) -> bool:
        return self.reference in ("frozen", "ema")

    @property
    def trained_share(self) -> float:
        return self.lora_share if self.reference == "adapter" else 1.0


class Layer(NamedTuple):
    """Seconds of one layer: compute, and collectives of the engine around it."""

    forward: float
    backward: float
    gather: float  # all-gather before the forward, and again before the backward
    reduce: float  # of its gradients


class Volume(NamedTuple):
    """Bytes that one GPU sends in an optimizer step."""

    gather: float = 0.0
    reduce: float = 0.0
    activations: float = 0.0  # tensor parallel
    head: float = 0.0  # vocab-parallel
    counts: float = 0.0
    metrics: float = 0.0
    ema: float = 0.0  # local shards: none, ever

    @property
    def total(self) -> float:
        return sum(self)


def reduce_width(run: Run, engine: Engine) -> int:
    """Bytes of a reduced gradient: DeepSpeed reduces in the training dtype, bf16."""
    return 2 if engine == "zero3" else run.reduce_bytes


def ring_share(ranks: int) -> float:
    """What one rank sends of a buffer in an all-gather or reduce-scatter, as a share of it."""
    return (ranks - 1) / ranks


def gathered_bytes(layer_params: float, layers: int, root_params: float, run: Run) -> float:
    """Parameters gathered in a micro-batch, in bytes of whole tensors.

    Policy: layers before the forward and again before the backward. FSDP2 keeps the root group
    (embeddings, head) from forward to backward; under ZeRO-3 the head is gathered once because its
    gradients are taken in the forward, the embedding's backward reads no weight. The reference:
    once if it is a model of its own; with an adapter the policy's layers are gathered once more.
    """
    policy = 2 * layers * layer_params + root_params
    reference = layers * layer_params if run.has_forward else 0.0
    reference += root_params if run.second_model else 0.0
    return (policy + reference) * run.gather_bytes


def step_volume(model: Model, run: Run, engine: Engine, gpus: int, cluster: Cluster) -> Volume:
    """Bytes that one GPU sends, by what for."""
    tp = cluster.gpus_per_node if engine == "tp8_fsdp2" else 1
    ranks = max(1, gpus // tp)
    share, size = ring_share(ranks), run.micro_batches
    trained = (model.layers * model.layer_params) * run.trained_share
    if run.reference != "adapter":
        trained += model.root_params
    reduced = trained * reduce_width(run, engine) / tp
    counts = 2 * ring_share(gpus) * 16
    packed = packed_numel(size * run.logging_steps, gpus)
    metrics = 2 * ring_share(gpus) * 8 * packed / run.logging_steps
    if engine == "ddp":
        return Volume(reduce=2 * share * reduced, counts=counts, metrics=metrics)
    gather = gathered_bytes(model.layer_params / tp, model.layers, model.root_params / tp, run)
    found = Volume(share * gather * size, share * reduced * size, 0, 0, counts, metrics)
    if tp == 1:
        return found
    both = 2 * ring_share(tp)  # an all-reduce
    tokens = tp * run.tokens  # the same eight micro-batches' worth, in every GPU's activations
    block = both * tokens * model.hidden * 2
    passes = 2 + 2 + (2 if run.recompute else 0) + (2 if run.has_forward else 0)
    scored = tokens * run.scored
    head = both * scored * (4 * 2 * (2 if run.has_forward else 1) + model.hidden * 2)
    return found._replace(activations=block * (passes * model.layers + 1) * size, head=head * size)


def layer_flops(model: Model, run: Run) -> float:
    """Forward of a layer over T tokens: its matrices, and causal attention."""
    return run.tokens * (2 * model.layer_params + 2 * run.length * model.hidden)


def head_flops(model: Model, run: Run) -> float:
    """GEMMs of the head: three for the policy (two if it is frozen), one for the reference."""
    gemm = 2 * run.tokens * run.scored * model.head_params
    return gemm * ((2 if run.reference == "adapter" else 3) + (1 if run.has_forward else 0))


def layer_of(model: Model, run: Run, engine: Engine, gpus: int, cluster: Cluster) -> Layer:
    """One layer of the policy: compute, the engine's collectives, the activations' all-reduces."""
    forward = layer_flops(model, run) / cluster.flops
    weights = 0.0 if run.reference == "adapter" else 1.0  # a frozen matrix has no dW
    backward = forward * (1 + weights + (1 if run.recompute else 0))
    if gpus == 1:
        return Layer(forward, backward, 0.0, 0.0)
    tp = cluster.gpus_per_node if engine == "tp8_fsdp2" else 1
    ranks, across = max(1, gpus // tp), tp > 1
    trained = model.layer_params * run.trained_share / tp * reduce_width(run, engine)
    if engine == "ddp":
        return Layer(forward, backward, 0.0, cluster.reduce_seconds(trained, ranks))
    whole = model.layer_params / tp * run.gather_bytes
    gather = cluster.gather_seconds(whole, ranks, across=across)
    reduce = cluster.gather_seconds(trained, ranks, across=across)
    if tp > 1:
        block = cluster.reduce_seconds(tp * run.tokens * model.hidden * 2, tp)
        forward += 2 * block
        backward += (4 if run.recompute else 2) * block
    return Layer(forward, backward, gather, reduce)


def root_seconds(
    model: Model, run: Run, engine: Engine, gpus: int, cluster: Cluster
) -> tuple[float, float, float]:
    """``(head's compute, gather of the root, reduction of the root)``; the last two exposed."""
    compute = head_flops(model, run) / cluster.flops
    if gpus == 1:
        return compute, 0.0, 0.0
    tp = cluster.gpus_per_node if engine == "tp8_fsdp2" else 1
    ranks, across = max(1, gpus // tp), tp > 1
    share = 0.0 if run.reference == "adapter" else 1.0
    trained = share * model.root_params / tp * reduce_width(run, engine)
    if engine == "ddp":
        return compute, 0.0, cluster.reduce_seconds(trained, ranks)
    models = 2 if run.second_model else 1
    gather = models * cluster.gather_seconds(
        model.root_params / tp * run.gather_bytes, ranks, across=across
    )
    if tp > 1:
        scored = tp * run.tokens * run.scored
        passes = 2 if run.has_forward else 1
        compute += passes * 2 * cluster.reduce_seconds(4 * scored, tp)
        compute += cluster.reduce_seconds(scored * model.hidden * 2, tp)
    return compute, gather, cluster.gather_seconds(trained, ranks, across=across)


def closed_forward(layer: Layer, layers: int, prefetch: bool = True) -> float:
    """Layers one after the other, the next one's gather under this one's compute."""
    if not prefetch:
        return layers * (layer.gather + layer.forward)
    return layer.gather + (layers - 1) * max(layer.forward, layer.gather) + layer.forward


def closed_backward(layer: Layer, layers: int, prefetch: bool = True) -> float:
    """The same with reductions on the same wire, each under the next layer's compute."""
    if not prefetch:
        return layers * (layer.gather + layer.backward + layer.reduce)
    wire = layer.gather + layer.reduce
    return layer.gather + (layers - 1) * max(layer.backward, wire) + layer.backward + layer.reduce


def closed_step(model: Model, run: Run, engine: Engine, gpus: int, cluster: Cluster) -> float:
    """Seconds of an optimizer step."""
    layer = layer_of(model, run, engine, gpus, cluster)
    compute, gather, reduce = root_seconds(model, run, engine, gpus, cluster)
    quiet = layer._replace(reduce=0.0) if engine == "ddp" else layer
    passes = 0.0
    for k in range(run.micro_batches):
        last = k == run.micro_batches - 1
        passes += closed_forward(layer, model.layers) * (2 if run.has_forward else 1)
        passes += closed_backward(layer if last else quiet, model.layers)
        passes += compute + gather + (reduce if last or engine != "ddp" else 0.0)
    return passes + small_seconds(model, run, gpus, engine, cluster)


def small_seconds(model: Model, run: Run, gpus: int, engine: Engine, cluster: Cluster) -> float:
    """Counts (one all-reduce a step), metrics (one a log step), EMA (memory traffic, no wire)."""
    nodes = max(1, gpus // cluster.gpus_per_node)
    hops = (min(gpus, cluster.gpus_per_node) - 1) * cluster.latency_nvlink
    hops += (nodes - 1) * cluster.latency_network
    wire = 2 * hops * (1 + 1 / run.logging_steps) if gpus > 1 else 0.0
    shards = 1 if engine == "ddp" else gpus
    ema = 3 * 2 * model.params / shards / cluster.hbm / run.ema_steps
    return wire + (ema if run.reference == "ema" else 0.0)


def state_bytes(model: Model, run: Run, engine: Engine, gpus: int) -> float:
    """Weights, gradients, AdamW states and reference of one GPU: without activations."""
    trained = model.params * run.trained_share
    mine = 2 * model.params + 16 * trained  # bf16 copy; float32 master, gradient, two moments
    theirs = 2 * model.params if run.second_model else 0.0
    return (mine + theirs) / (1 if engine == "ddp" else gpus)
