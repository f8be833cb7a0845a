"""A job in a process of its own, as torchrun, SLURM or a shell would start it.

The process is forked by the server that forks local workers, too: it has loaded torch and diffusers, for which every
process would need seconds, and nothing else. Signals, environment, exit code and death are those of any process.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

from builder.errors import Terminated
from builder.job.engines.local import context_of
from builder.job.run import run_job
from builder.job.spec import JobSpec
from builder.job.until_accepted import run_until_accepted
from builder.shards.criteria import Criteria


class Launched:
    """The first `count` images of `spec`, or with `where` until so many images pass it; `environ` is what is added."""

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
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environ)
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
