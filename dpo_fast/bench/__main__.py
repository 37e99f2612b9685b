"""``python -m dpo_fast.bench``: the suites of an installed package."""

import sys

from dpo_fast.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
