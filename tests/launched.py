"""Processes as torchrun, SLURM or a shell would start them.

They are forked by the server that forks local workers, too: it has loaded torch and diffusers, for which every process
would need seconds, and nothing else. Signals, environment, exit code and death are those of any process.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from builder.errors import Terminated
from builder.job.engines.local import context_of
from builder.job.run import run_job
from builder.job.spec import JobSpec
from builder.job.until_accepted import run_until_accepted
from builder.shards.criteria import Criteria


def torchrun(function: Callable[..., None], *words: Any, world: int = 2) -> None:
    """Run `function(*words)`, of a module, in `world` processes that torchrun would have told of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        environ = {**os.environ, **master, **place}
        processes.append(context_of("cpu").Process(target=_called, args=(function, words, environ), daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(600)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world, "what they said is on stderr"


def _called(function: Callable[..., None], words: Sequence[Any], environ: dict[str, str]) -> None:
    as_if_new(environ)
    torch.set_num_threads(1)
    function(*words)


def as_if_new(environ: dict[str, str]) -> None:
    """Signals and environment as a shell's child has them."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ.clear()
    os.environ.update(environ)


class Launched:
    """A job: the first `count` images of `spec`, or with `where` until so many pass it; `environ` is what is added."""

    def __init__(
        self, spec: JobSpec, environ: dict[str, str], engine: str, count: int, *, grace: float = 30, where: str = ""
    ) -> None:  # fmt: skip
        context = context_of("cpu")
        self._hears, says = context.Pipe(duplex=False)
        words = spec, {**os.environ, **environ}, engine, count, grace, where, says
        self.process = context.Process(target=_job, args=words, daemon=True)
        self.process.start()
        says.close()

    def hear(self) -> str:
        """What it says next. EOFError when it has ended."""
        said: str = self._hears.recv()
        return said

    def exit_code(self) -> int:
        """Wait for its end. A negative number is the signal that killed it."""
        self.process.join(600)
        self.process.kill()
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def last_words(self) -> str:
        """All that it has said and nobody heard; the traceback comes last."""
        said = []
        while self._hears.poll():
            try:
                said.append(self.hear())
            except EOFError:
                break
        return "\n".join(said)


def _job(
    spec: JobSpec, environ: dict[str, str], engine: str, count: int, grace: float, where: str, says: Connection
) -> None:  # fmt: skip
    as_if_new(environ)
    how = {"lineage": {}, "licence": {}, "engine": engine, "workers": 1, "say": says.send, "grace": grace}
    try:
        if where:
            outcome = run_until_accepted(spec, count, lambda _: Criteria(where=where), **how).raw
        else:
            outcome = run_job(spec, count, **how)
    except Terminated as end:
        sys.exit(end.exit_code)
    except Exception:
        says.send(traceback.format_exc())
        raise
    sys.exit(1 if outcome.failed else 0)
