"""``python -m dpo_fast.cli``: the command without its script, as launchers start it."""

import sys

from dpo_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
