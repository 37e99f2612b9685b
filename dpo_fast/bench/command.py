"""The command line of the suites."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dpo_fast.bench.run import DEVICES, SUITES, run

QUICK_OUT = Path("runs/bench")


def main(
    argv: Sequence[str] | None = None,
    prog: str = "python -m dpo_fast.bench",
    results: Path = QUICK_OUT,
) -> int:
    """Run what the words ask for and print the files written.

    Args:
        argv: the words; None: those of this process.
        prog: the name in the help.
        results: where full runs are written without ``--out``.
    """
    options = build_parser(prog).parse_args(argv)
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    out = options.out or (QUICK_OUT if options.quick else results)
    written = run(
        options.suites or SUITES,
        options.device,
        options.quick,
        out,
        only=options.only,
        seconds=options.seconds,
        rounds=options.rounds,
        say=lambda line: print(line, flush=True),
    )
    for path in written:
        print(path)
    return 0


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Its options; `dpo-fast bench` takes the same."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="dpo_fast against the naive path, TRL, Liger, cut-cross-entropy and "
        "torch.compile. Cases that these sources measured on this machine are kept, so a long "
        "suite can be run in several calls.",
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: minutes")
    parser.add_argument("--only", default=None, help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=None, help="start no case after so long")
    parser.add_argument("--rounds", type=int, default=None, help="timed steps of each variant")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default torch's")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result files")
    return parser
