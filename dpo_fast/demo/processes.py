"""One process a stage, so that seconds and peak memory of one do not carry the traces of
another.
"""

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

STAGES = "dpo_fast.demo.stages"


class StageProcesses:
    """Runs functions of `dpo_fast.demo.stages`, each in a fresh process.

    On Linux the processes are forked from a server that has imported the library and done nothing
    else, which saves each of them some seconds; elsewhere they start from scratch.
    """

    def __init__(self) -> None:
        linux = sys.platform == "linux"
        self._context: Any = multiprocessing.get_context("forkserver" if linux else "spawn")
        if linux:
            self._context.set_forkserver_preload([STAGES])

    def run(self, function: str, *args: Any) -> Any:
        """``function(*args)``: its result.

        Raises:
            RuntimeError: the process failed; its own message is on stderr.
        """
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_call, args=(sender, function, args))
        process.start()
        sender.close()
        try:
            result = receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(
                f"The stage {function}{args[:1]} ended with exit code {process.exitcode} before it "
                "had a result: see its message above."
            ) from None
        process.join()
        return result


def _call(sender: Connection, function: str, args: tuple[Any, ...]) -> None:
    from importlib import import_module

    stage: Callable[..., Any] = getattr(import_module(STAGES), function)
    sender.send(stage(*args))
    sender.close()
