"""`dpo-fast bench`: the benchmark suites from an installed package."""


def run(words: list[str]) -> int:
    """Run what the words ask for; results go to ``runs/bench`` unless ``--out`` names a folder."""
    from dpo_fast.bench.command import main

    return main(words, prog="dpo-fast bench")
