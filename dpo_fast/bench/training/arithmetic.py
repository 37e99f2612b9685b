"""Tokens and FLOPs of a training step in each layout."""

from functools import cache

from dpo_fast.bench.workload import ModelShape, Row, make_model
from dpo_fast.layouts import pair_lengths
from dpo_fast.layouts.last_layer import position_wise_parts
from dpo_fast.models.layers import layer_list

ALL_ROWS = ("naive", "trl", "TRL 0.24 style", "TRL", "Liger")  # score prompt and padding, too


def tokens_of(layout: str, rows: list[Row]) -> tuple[int, int]:
    """(tokens through the backbone, tokens through the LM head) of a step's forward.

    Args:
        layout: "packed", "shared_prefix", the name of a baseline, or another (padded rows, of
            which only answer tokens are scored).
    """
    lengths = pair_lengths(rows)
    scored = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    name = layout.removeprefix("dpo_fast ")
    backbone = {
        "packed": int(lengths.packed.sum()),
        "shared_prefix": int(lengths.shared_prefix.sum()),
    }.get(name, lengths.padded(len(rows)))
    return backbone, backbone if layout in ALL_ROWS else scored


def gemm_flops(layout: str, shape: ModelShape, rows: list[Row], forwards: int = 2) -> float:
    """FLOPs of a step's GEMMs without attention: ``forwards``, and one backward of two."""
    return (forwards + 2) * forward_flops(layout, shape, rows)


def forward_flops(layout: str, shape: ModelShape, rows: list[Row]) -> float:
    """FLOPs of the GEMMs of one forward, without attention.

    Where only answer tokens are scored, the last layer's position-wise parts run on them alone.
    """
    layers, head = parameters_of(shape)
    backbone, scored = tokens_of(layout, rows)
    narrow = last_position_wise(shape)
    return 2.0 * (backbone * (layers - narrow) + scored * (narrow + head))


@cache
def last_position_wise(shape: ModelShape) -> int:
    """Parameters of the last layer's parts that need not see every token."""
    layers = layer_list(make_model(shape))
    assert layers is not None
    return sum(p.numel() for part in position_wise_parts(layers[-1]) for p in part.parameters())


@cache
def parameters_of(shape: ModelShape) -> tuple[int, int]:
    """Parameters of the layers, and of the LM head."""
    model = make_model(shape)
    head = sum(p.numel() for p in model.get_output_embeddings().parameters())
    embeddings = sum(p.numel() for p in model.get_input_embeddings().parameters())
    return sum(p.numel() for p in model.parameters()) - head - embeddings, head
