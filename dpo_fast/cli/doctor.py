"""`dpo-fast doctor`: what runs here and why, what is missing and what that costs, and whether the
numbers are right.
"""

import argparse
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from dpo_fast import __version__
from dpo_fast.cli.doctor_facts import (
    Check,
    backend_checks,
    compiled_checks,
    device_checks,
    folder_checks,
    version_checks,
)

_MARKS = {"ok": ("ok  ", "green"), "note": ("note", "yellow"), "fail": ("FAIL", "bold red")}


def run(words: list[str]) -> int:
    """Print the findings; 0 if training works here, else 1."""
    parser = argparse.ArgumentParser(prog="dpo-fast doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    parser.add_argument(
        "--ref_cache_dir", default=None, help="cache of reference log-probs to check"
    )
    options = parser.parse_args(words)
    logger = logging.getLogger("dpo_fast")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its news are among the findings
    try:
        findings = examine(options.ref_cache_dir)
        checks = list(findings) if options.json else list(shown(findings))
    finally:
        logger.setLevel(level)
    ok = all(check.status != "fail" for check in checks)
    if options.json:
        found = {"dpo_fast": __version__, "ok": ok, "checks": [asdict(c) for c in checks]}
        print(json.dumps(found, indent=2))
    return 0 if ok else 1


def examine(ref_cache_dir: str | None = None) -> Iterator[Check]:
    """All findings, cheap ones first; without torch there are no others."""
    versions = list(version_checks())
    yield from versions
    if any(check.name == "torch" and check.status == "fail" for check in versions):
        return
    from dpo_fast.cli.doctor_parity import parity_checks

    yield from device_checks()
    yield from compiled_checks()
    yield from backend_checks()
    yield from folder_checks(ref_cache_dir)
    yield from parity_checks()


def shown(checks: Iterable[Check]) -> Iterator[Check]:
    """Print each finding as it comes (kernels take their time to compile), and hand it on."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"dpo-fast {__version__}", style="bold")
    section, failed = "", 0
    for check in checks:
        if check.section != section:
            section = check.section
            console.print(f"\n{section}", style="bold")
        mark, style = _MARKS[check.status]
        console.print(Text.assemble("  ", (mark, style), f"  {check.name:<26}{check.detail}"))
        if check.remedy:
            console.print(Text(f"{'':<34}{check.remedy}", style="dim"))
        failed += check.status == "fail"
        yield check
    console.print()
    if failed:
        console.print(f"{failed} problem(s): see the lines marked FAIL.", style="bold red")
    else:
        console.print("Training works here.", style="bold green")
