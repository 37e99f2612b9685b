"""A frozen reference whose layers wait in host memory: what it saves on a GPU, and what it costs.

    python -m benchmarks.ref_offload   # Llama-3-8B's shape, bf16; 32 GiB of host memory

Two references with the same random weights, one that stays on the device and one that streams,
score the same padded rows in turn. Before anything is timed, the log-probs must be the same bits.
Memory is the allocator's: what the reference holds, and the peak of a forward. Written to
``results/ref_offload_cuda.json``; "ratio" is the median of the ratios within rounds.
"""

import argparse
import statistics
from typing import Any

import torch

from benchmarks.machine import write_result
from dpo_fast.batch import PlannedCollator
from dpo_fast.bench.timing import median_ratio, take_turns
from dpo_fast.data.collate import DataCollatorForPreference
from dpo_fast.reference.frozen import FrozenReference

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
}
WIDTH = 1024  # tokens of a row


def model(layers: int) -> Any:
    """Random weights in bf16 on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **SHAPE, num_hidden_layers=layers)
    with torch.device("cuda"):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def batch(rows: int) -> dict[str, Any]:
    """``rows`` rows of WIDTH tokens, a quarter of them the prompt."""
    generator = torch.Generator().manual_seed(rows)

    def ids(n: int) -> list[int]:
        return torch.randint(1, SHAPE["vocab_size"], (n,), generator=generator).tolist()

    prompt, answer = WIDTH // 4, WIDTH - WIDTH // 4
    names = {"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answer}
    pairs = [{name: ids(n) for name, n in names.items()} for _ in range(rows // 2)]
    made = PlannedCollator(DataCollatorForPreference(pad_token_id=0))(pairs)
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in made.items()}


def peak_of(reference: FrozenReference, given: dict[str, Any]) -> int:
    """Bytes that a forward holds at most beyond what stood before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    reference.logps(given)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def held_by(layers: int, *, offload: bool) -> tuple[FrozenReference, int]:
    """A reference and the bytes that it holds on the device."""
    before = torch.cuda.memory_allocated()
    made = model(layers)
    if offload:
        made.to("cpu")
    policy = model(1)
    reference = FrozenReference(made, policy)
    del policy
    if offload:
        reference.offload_layers(torch.device("cuda"))
    torch.cuda.synchronize()
    return reference, torch.cuda.memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    stays, whole = held_by(options.layers, offload=False)
    streams, rest = held_by(options.layers, offload=True)
    assert streams.stream is not None
    result: dict[str, Any] = {
        "shape": {**SHAPE, "layers": options.layers},
        "bytes": {
            "stays": whole,
            "streams": rest,
            "layers_in_host_memory": streams.stream.host_bytes,
            "slots": streams.stream.slot_bytes,
        },
        "forwards": [],
    }
    for rows in options.rows:
        given = batch(rows)
        equal = torch.equal(stays.logps(given), streams.logps(given))
        if not equal:
            raise AssertionError(f"{rows} rows: the streamed log-probs are other bits")
        peaks = {"stays": peak_of(stays, given), "streams": peak_of(streams, given)}
        steps = {
            "stays": lambda given=given: stays.logps(given),
            "streams": lambda given=given: streams.logps(given),
        }
        times = take_turns(steps, options.rounds, "cuda")
        median = {name: statistics.median(values) for name, values in times.items()}
        found = {
            "tokens": rows * WIDTH,
            "seconds": median,
            "ratio": median_ratio(times["streams"], times["stays"]),
            "peak_bytes_of_a_forward": peaks,
            "copied_gb_per_s": streams.stream.host_bytes / 1e9 / median["streams"],
        }
        result["forwards"].append(found)
        print(found, flush=True)
    print(result["bytes"])
    print(write_result("ref_offload_cuda", result, "cuda"))


if __name__ == "__main__":
    main()
