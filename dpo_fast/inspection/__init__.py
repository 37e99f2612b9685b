"""What a data set of preference pairs holds: counts, a table, a picture."""

from dpo_fast.inspection.pairs import Inspection, inspect_dataset
from dpo_fast.inspection.picture import draw

__all__ = ["Inspection", "draw", "inspect_dataset"]
