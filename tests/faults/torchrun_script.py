"""What torchrun starts in the test of its summary: rank 1 fails after the first step."""

import sys

from tests.faults.jobs import train_rank

train_rank("adapter", sys.argv[1], ["raise", 1, 1], {"save_strategy": "no"})
