"""One rank: a TR-DPO reference in bf16 over a checkpoint, with the state that its rounding needs.

The run that saves goes on to its end; the resumed one starts from the checkpoint's copy.
"""

import shutil
from pathlib import Path
from typing import Any

from tests.distributed import cells
from tests.distributed.ema_bits import build
from tests.distributed.train_cells import check_engine, reset, use

CASES = ("stochastic", "shadow")
SAVED, STEPS = 2, 4


def main(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """By case: updates done, the reference with its shadows, and what the checkpoint holds."""
    engine, ranks, folder = spec["engine"], spec["ranks"], Path(spec["folder"])
    overrides = {**use(engine), "save_strategy": "steps", "save_steps": SAVED, "max_steps": STEPS}
    results = {}
    for case in CASES:
        reset()
        own = folder / case / (f"resumed{ranks}" if spec["resume"] else "run")
        trainer = build(case, ranks, {**overrides, "output_dir": str(own)})
        saved = folder / case / "run" / f"checkpoint-{SAVED}"
        trainer.train(resume_from_checkpoint=str(saved) if spec["resume"] else None)
        check_engine(trainer, engine, ranks)
        results[case] = {
            "updates": trainer.reference.updates,
            "reference": cells.moved_reference(trainer),
            "policy": cells.whole(trainer.model),
            "files": sorted(path.name for path in saved.glob("reference*")),
        }
        if rank == 0:
            shutil.rmtree(own / f"checkpoint-{STEPS}")
    return results if rank == 0 else {}
