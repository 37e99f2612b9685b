"""`dpo-fast plan MODEL`: memory and time of every way to train a model, from its config alone."""

import argparse
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dpo_fast.cli.checks import check_model
from dpo_fast.cli.errors import UsageError
from dpo_fast.cli.logs import show_logs
from dpo_fast.cli.tables import print_table
from dpo_fast.hub_names import local_name
from dpo_fast.models.given import refuse_encoder_decoder

if TYPE_CHECKING:
    from dpo_fast.plan import Batches, Cell, Device, Run

logger = logging.getLogger("dpo_fast")

DESCRIPTION = (
    "Plan a training before anything is loaded: peak memory (weights, reference, gradients, "
    "optimizer, LM head, activations) and where a step's time goes, for each reference strategy, "
    "batch layout and kind of fine-tuning, with AdamW on one device; what fits, and which to take. "
    "The model's own forward and backward run on tensors without memory, so activations are what "
    "autograd would keep. Times are matrix products at a share of the device's peak rate."
)
_SWITCH = {"on": True, "off": False}


def run(words: list[str]) -> int:
    """Print the plan."""
    options = _parser().parse_args(words)
    show_logs()
    from dpo_fast.plan import find_device, plan_cells, settings, why_not_layouts
    from dpo_fast.plan.cells import Run
    from dpo_fast.plan.choose import choose

    device = find_device(
        options.device,
        memory=options.memory and options.memory * 2**30,
        bf16=options.tflops and options.tflops * 1e12,
        fp32=options.tflops_fp32 and options.tflops_fp32 * 1e12,
        bandwidth=options.bandwidth and options.bandwidth * 1e9,
    )
    run = Run(
        device=device,
        efficiency=options.efficiency,
        accumulation=options.gradient_accumulation_steps,
        sync_steps=options.ref_model_sync_steps,
        max_length=options.max_length,
        truncation_mode=options.truncation_mode,
        workspace=options.lm_head_workspace,
    )
    config, lora = read_config(options), lora_config(options)
    batches = find_batches(options)
    excluded = why_not_layouts(config)
    wanted = settings(
        options.kind,
        options.precision,
        [_SWITCH[word] for word in options.checkpointing],
        [layout for layout in options.layout if layout not in excluded],
        options.reference,
    )
    cells = list(plan_cells(config, batches, wanted, run, lora))
    if not cells:
        raise UsageError(
            "no combination is left: the reference 'adapter' needs --kind lora"
            + "".join(f"; {name}: {reason}" for name, reason in excluded.items())
        )
    choice = choose(cells, device, options.num_train_epochs)
    notes = [f"no {name}: {reason}" for name, reason in excluded.items() if name in options.layout]
    if options.json:
        print(json.dumps(as_dict(options, run, batches, cells, choice, notes), indent=2))
    else:
        show(options, run, batches, cells, choice, notes)
    return 0


def _parser() -> argparse.ArgumentParser:
    from dpo_fast.plan.setting import KINDS, LAYOUTS, PRECISIONS, REFERENCES

    parser = argparse.ArgumentParser(
        prog="dpo-fast plan",
        description=DESCRIPTION,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder with a config.json, or a hub name")
    add("--model_revision", default="main", help="branch, tag or commit on the hub")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--attn_implementation", default=None, help="eager or sdpa; default: the model's own")
    ways = parser.add_argument_group("ways to train, each of several values")
    for name, choices, default in (
        ("kind", KINDS, KINDS),
        ("precision", PRECISIONS, PRECISIONS[:1]),
        ("layout", LAYOUTS, LAYOUTS),
        ("reference", REFERENCES, REFERENCES),
        ("checkpointing", tuple(_SWITCH), ("on",)),
    ):
        ways.add_argument(f"--{name}", nargs="+", choices=choices, default=default)
    data = parser.add_argument_group("the pairs: numbers of tokens, or a data set with --tokenizer")
    for name, tokens in (("prompt", 256), ("chosen", 256), ("rejected", 256)):
        text = "tokens of an answer" if name != "prompt" else "tokens of a prompt"
        text += "; several numbers are taken in turn"
        data.add_argument(f"--{name}_tokens", type=int, nargs="+", default=[tokens], help=text)
    data.add_argument("--dataset_name", default=None, help="pairs, as in `dpo-fast train`")
    data.add_argument("--dataset_train_split", default="train", help="split, or a slice of one")
    data.add_argument("--tokenizer", default=None, help="for --dataset_name; default: MODEL's")
    data.add_argument("--max_length", type=_length, default=1024, help="a number, or none")
    data.add_argument("--truncation_mode", choices=("keep_start", "keep_end"), default="keep_start")
    _add_run(parser)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("the run")
    run.add_argument("--per_device_train_batch_size", type=int, default=8, help="pairs")
    run.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches")
    run.add_argument("--num_train_epochs", type=float, default=1.0, help="spread a precomputation")
    run.add_argument("--ref_model_sync_steps", type=int, default=512, help="of reference ema")
    run.add_argument("--lm_head_workspace", type=int, default=None, help="bytes")
    run.add_argument("--lora_r", type=int, default=16, help="rank")
    run.add_argument(
        "--lora_target_modules", nargs="+", default=["all-linear"], help="names, or all-linear"
    )
    device = parser.add_argument_group("the device")
    device.add_argument("--device", default="auto", help="a name of the table, cpu, or auto")
    device.add_argument("--memory", type=float, default=None, help="GiB, instead of the table's")
    device.add_argument("--tflops", type=float, default=None, help="bf16 peak, 10^12 FLOP/s")
    device.add_argument("--tflops_fp32", type=float, default=None, help="float32 peak")
    device.add_argument("--bandwidth", type=float, default=None, help="10^9 bytes/s")
    device.add_argument("--efficiency", type=float, default=0.4, help="share of the peak reached")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def _length(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def read_config(options: Any) -> Any:
    """The model's config; no weight is read.

    Raises:
        UsageError: there is none. ValueError: of an encoder-decoder.
    """
    from transformers import AutoConfig

    check_model(options.model, "MODEL")
    extra = {}
    if options.attn_implementation is not None:
        extra["attn_implementation"] = options.attn_implementation
    try:
        config = AutoConfig.from_pretrained(
            local_name(options.model),
            revision=options.model_revision,
            trust_remote_code=options.trust_remote_code,
            **extra,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"the config of {options.model!r} cannot be read: {error}") from error
    refuse_encoder_decoder(config, repr(options.model))
    return config


def lora_config(options: Any) -> Any:
    """The adapter of the kind "lora", or None."""
    if "lora" not in options.kind:
        return None
    from peft import LoraConfig

    names = options.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        target_modules=names[0] if names == ["all-linear"] else names,
    )


def find_batches(options: Any) -> "Batches":
    """From the data set if there is one, else from the numbers.

    Raises:
        UsageError: numbers out of range, or a data set that cannot be read.
    """
    from dpo_fast.plan import batches_of_dataset, batches_of_lengths

    pairs = options.per_device_train_batch_size
    if options.dataset_name is None:
        lengths = options.prompt_tokens, options.chosen_tokens, options.rejected_tokens
        try:
            return batches_of_lengths(pairs, *lengths)
        except ValueError as error:
            raise UsageError(str(error)) from error
    from transformers import AutoTokenizer

    from dpo_fast.data.load import load_preferences
    from dpo_fast.data.prepare import prepare_dataset

    name = options.tokenizer or options.model
    try:
        dataset = load_preferences(options.dataset_name, split=options.dataset_train_split)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UsageError(f"--dataset_name {options.dataset_name}: {error}") from error
    limits = options.max_length, options.truncation_mode
    prepared, _ = prepare_dataset(
        dataset, tokenizer, max_length=limits[0], truncation_mode=limits[1]
    )
    return batches_of_dataset(prepared, pairs, *limits)


def as_dict(
    options: Any, run: "Run", batches: "Batches", cells: Sequence["Cell"], choice: Any, notes: Any
) -> dict[str, Any]:
    """All that the table says, in bytes and seconds."""
    from dpo_fast.plan.choose import fits

    return {
        "model": options.model,
        "device": vars(run.device),
        "efficiency": run.efficiency,
        "pairs": batches.source,
        "notes": list(notes),
        "cells": [
            {
                **vars(cell.setting),
                "memory": dict(cell.memory),
                "peak": cell.peak,
                "peak_in": cell.phase,
                "fits": fits(cell, run.device),
                "seconds": dict(cell.seconds),
                "shares": cell.shares(),
                "seconds_once": cell.once,
                "seconds_per_pair": cell.seconds_per_pair,
                "tokens": cell.tokens,
            }
            for cell in cells
        ],
        "best": None if choice.best is None else vars(choice.best.setting),
        "reason": choice.reason,
    }


def show(
    options: Any, run: "Run", batches: "Batches", cells: Sequence["Cell"], choice: Any, notes: Any
) -> None:
    """The table."""
    device = run.device
    print(f"{options.model} on {describe(device)}")
    print(f"{batches.source}; {run.accumulation} micro-batch(es) a step")
    for note in notes:
        print(note)
    groups: dict[tuple[str, str, bool], list[Cell]] = {}
    for cell in cells:
        own = cell.setting
        groups.setdefault((own.kind, own.precision, own.checkpointing), []).append(cell)
    for (kind, precision, checkpointing), members in groups.items():
        print()
        recompute = "on" if checkpointing else "off"
        title = f"{kind} fine-tuning, {precision}, gradient checkpointing {recompute}"
        _show_group(title, members, device)
    print()
    print("GiB by part at the moment of the peak; time: share of a step, without what is done once")
    if choice.best is None:
        print(choice.reason)
    else:
        print(f"best: {choice.best.setting.describe()}: {choice.reason}")


def _show_group(title: str, cells: Sequence["Cell"], device: "Device") -> None:
    from dpo_fast.plan.cells import MEMORY_PARTS, TIME_PARTS
    from dpo_fast.plan.choose import fits

    headers = ["layout", "reference", *MEMORY_PARTS, "peak", "fits", "ms/pair"]
    headers += [f"{name} %" for name in TIME_PARTS]
    rows = []
    for cell in cells:
        shares = cell.shares()
        rows.append(
            [
                cell.setting.layout,
                cell.setting.reference,
                *(_gib(cell.memory[name]) for name in MEMORY_PARTS),
                _gib(cell.peak),
                "yes" if fits(cell, device) else "no",
                f"{1e3 * cell.seconds_per_pair:.3g}",
                *(f"{100 * shares[name]:.0f}" for name in TIME_PARTS),
            ]
        )
    print_table(title, headers, rows, left=2)


def describe(device: "Device") -> str:
    """A device in one line."""
    return (
        f"{device.name}: {device.memory / 2**30:.1f} GiB, {device.bf16 / 1e12:.4g} TFLOP/s bf16, "
        f"{device.fp32 / 1e12:.4g} fp32, {device.bandwidth / 1e9:.4g} GB/s ({device.source})"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}" if size >= 0.01 * 2**30 or not size else f"{size / 2**30:.4f}"
