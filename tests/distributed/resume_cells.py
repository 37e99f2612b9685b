"""One rank of a run that saves, or of one that goes on from it on any number of ranks."""

import shutil
from pathlib import Path
from typing import Any

from tests.distributed import cells
from tests.distributed.train_cells import reset, use

SAVED, STEPS = 3, 6


def main(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """``spec``: engine, ranks, cells, folder, resume (from the copies that ``save`` left)."""
    saving = {"save_strategy": "steps", "save_steps": SAVED}
    # weights that decay and norms that do not: two groups of the optimizer
    overrides = {**use(spec["engine"]), **saving, "weight_decay": 0.1}
    results = {}
    for strategy, layout in spec["cells"]:
        reset()
        folder = Path(spec["folder"]) / strategy
        name = f"resumed{spec['ranks']}" if spec["resume"] else "run"
        config = {**overrides, "max_steps": STEPS, "output_dir": str(folder / name)}
        trainer = cells.build(strategy, layout, spec["ranks"], **config)
        before = cells.whole(trainer.model)
        checkpoint = folder / "run" / f"checkpoint-{SAVED}"
        trainer.train(resume_from_checkpoint=str(checkpoint) if spec["resume"] else None)
        assert trainer.state.global_step == STEPS
        results[strategy] = cells.result(trainer, before)
        if rank == 0:
            shutil.rmtree(folder / name / f"checkpoint-{STEPS}")
    return results if rank == 0 else {}
