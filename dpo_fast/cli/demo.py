"""`dpo-fast demo`: the whole of DPO in three minutes on a CPU, without a network."""

import argparse

from dpo_fast.cli.logs import show_logs


def run(arguments: list[str]) -> int:
    """Run the demonstration; its exit code."""
    parser = argparse.ArgumentParser(
        prog="dpo-fast demo",
        description="Train a small causal LM on the shipped preference pairs with each of the four "
        "references; ends in a table and a picture. Offline, on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", default="runs/demo", help="where its files go")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and order")
    options = parser.parse_args(arguments)
    show_logs()
    from dpo_fast.demo import run_demo

    return run_demo(output_dir=options.output_dir, seed=options.seed)
