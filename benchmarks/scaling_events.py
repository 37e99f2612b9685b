"""The same step as events: kernels on a compute stream, collectives on a wire, in issue order.

Each resource runs its tasks one after the other in the order in which they are issued; a task
starts when its resource is free and what it depends on is done (or has begun). The closed form of
``scaling_model`` is the solution of this for equal layers; here layers may differ, wires may be
shared, and the gaps can be looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.scaling_model import (
    Cluster,
    Engine,
    Layer,
    Model,
    Run,
    layer_of,
    root_seconds,
    small_seconds,
)


@dataclass
class Timeline:
    """Tasks with their begin and end; ``free`` is when each resource has done what it was given."""

    free: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)

    def run(
        self, resource: str, seconds: float, after: Sequence[float] = ()
    ) -> tuple[float, float]:
        """Queue a task; returns ``(begin, end)``."""
        begin = max([self.free.get(resource, 0.0), *after])
        self.free[resource] = begin + seconds
        self.busy[resource] = self.busy.get(resource, 0.0) + seconds
        return begin, begin + seconds

    @property
    def end(self) -> float:
        return max(self.free.values(), default=0.0)


def forward(time: Timeline, layers: Sequence[Layer], *, prefetch: int = 1) -> None:
    """A forward over ``layers``: gather, then compute. A gather may begin once the layer
    ``prefetch`` places before it has begun to compute (0: once the one before has ended).
    """
    began, ended = [time.end], [time.end]
    for i, layer in enumerate(layers):
        ready = ended[-1] if prefetch == 0 else began[max(0, i + 1 - prefetch)]
        _, there = time.run("wire", layer.gather, [ready])
        begin, end = time.run("compute", layer.forward, [there])
        began.append(begin)
        ended.append(end)


def backward(time: Timeline, layers: Sequence[Layer], *, prefetch: int = 1) -> None:
    """A backward over ``layers``, last first. The wire takes the next layer's gather before the
    reduction of the one that has just ended, as engines issue them.
    """
    order = list(reversed(layers))
    start = time.end
    _, there = time.run("wire", order[0].gather, [start])
    for i, layer in enumerate(order):
        begin, end = time.run("compute", layer.backward, [there])
        if i + 1 < len(order) and prefetch:
            _, there = time.run("wire", order[i + 1].gather, [begin])
        _, reduced = time.run("wire", layer.reduce, [end])
        if i + 1 < len(order) and not prefetch:
            _, there = time.run("wire", order[i + 1].gather, [reduced])


def simulated_step(
    model: Model,
    run: Run,
    engine: Engine,
    gpus: int,
    cluster: Cluster,
    *,
    prefetch: int = 1,
    jitter: Sequence[float] = (1.0,),
) -> Timeline:
    """An optimizer step. ``jitter``: factors of the layers' compute, repeated over the layers."""
    plain = layer_of(model, run, engine, gpus, cluster)
    compute, gather, reduce = root_seconds(model, run, engine, gpus, cluster)
    layers = []
    for i in range(model.layers):
        factor = jitter[i % len(jitter)]
        layers.append(
            plain._replace(forward=plain.forward * factor, backward=plain.backward * factor)
        )
    time = Timeline()
    for k in range(run.micro_batches):
        last = k == run.micro_batches - 1
        synced = last or engine != "ddp"
        now = layers if synced else [layer._replace(reduce=0.0) for layer in layers]
        time.run("wire", gather, [time.end])
        if run.has_forward:
            forward(time, now, prefetch=prefetch)
        forward(time, now, prefetch=prefetch)
        time.run("compute", compute, [time.end])
        backward(time, now, prefetch=prefetch)
        time.run("wire", reduce if synced else 0.0, [time.end])
    time.run("wire", small_seconds(model, run, gpus, engine, cluster), [time.end])
    return time
