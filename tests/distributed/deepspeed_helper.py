"""A process that finds DeepSpeed and launches ranks of it: ``python -m
tests.distributed.deepspeed_helper``.

transformers, accelerate and TRL look for DeepSpeed when they are imported and import it wherever
they can, which costs every process seconds: the tests' own processes must not find it. One helper
imports it once and forks all ranks. A line on stdin is a launch (JSON arguments of
:func:`tests.distributed.launch.launch`), a line on stdout its error, or an empty text.
"""

import json
import os
import sys
from pathlib import Path

from tests.distributed.launch import launch
from tests.nursery import CONTEXT, PRELOADED

# what ZeRO imports when it is set up, torch.compile's machinery with it
LATE = ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "tests.distributed.ema_bits"]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    CONTEXT.set_forkserver_preload([*PRELOADED, *LATE])
    for line in sys.stdin:
        ranks, worker, spec, folder = json.loads(line)
        error = ""
        try:
            launch(ranks, worker, spec, Path(folder))
        except AssertionError as failure:
            error = str(failure)
        print(json.dumps(error), file=answers, flush=True)


if __name__ == "__main__":
    main()
