"""`--where`: an SQL condition over manifest rows, evaluated in a process with limits of time and memory.

A condition can ask for any amount of either, and duckdb cannot be interrupted within one function. So it runs in a
process of its own (see where_worker), without files, network or settings, and is killed when its time is over.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa

from builder.display import printable
from builder.errors import BuilderError
from builder.shards import where_worker as worker
from builder.shards.schema import IDENTITY, SCORE_NAMES

SECONDS = 30.0  # for the rows of one manifest
LENGTH = 20_000  # characters of a condition


class WhereProcess:
    """The process that evaluates one condition; it ends with this object."""

    def __init__(self, where: str) -> None:
        """BuilderError when the condition is too long, or no text."""
        self.where = where
        if len(where) > LENGTH:
            raise BuilderError(f"--where has {len(where):,} characters", f"at most {LENGTH:,} are possible")
        try:
            condition = where.encode()
        except UnicodeEncodeError:
            raise BuilderError(f"--where '{printable(where)}' is no text", "write it in UTF-8") from None
        script = [sys.executable, "-I", str(Path(worker.__file__))]
        self._process = subprocess.Popen(
            script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        worker.send(self._given, worker.CONDITION, condition)

    @property
    def _given(self) -> BinaryIO:
        return cast(BinaryIO, self._process.stdin)

    def satisfies(self, table: pa.Table) -> np.ndarray:
        """Which rows of a manifest satisfy the condition: bool [N]; unknown counts as not.

        BuilderError when it is no condition, or takes too much time or memory.
        """
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        limit = threading.Timer(SECONDS, self._process.kill)
        limit.daemon = True
        limit.start()
        try:
            worker.send(self._given, worker.TABLE, sink.getvalue().to_pybytes())
            kind, answer = worker.receive(cast(BinaryIO, self._process.stdout))
        except (EOFError, OSError):
            kind, answer = worker.MEMORY, b""  # killed, by the limit or by the system for want of memory
        finally:
            limit.cancel()
        if kind == worker.ROWS:
            return np.frombuffer(answer, bool)
        shown = printable(self.where)
        if kind == worker.MEMORY:
            raise BuilderError(
                f"--where '{shown}' takes more than it may: {SECONDS:.0f} s for a manifest, "
                f"{worker.CONFIG['memory_limit']} of memory",
                "write a simpler condition",
            )
        columns = ", ".join([*(field.name for field in IDENTITY), *SCORE_NAMES])
        raise BuilderError(
            f"--where '{shown}' is no condition over the manifest: {printable(answer.decode())}",
            f"write for example --where \"ssim > 0.7 and phase = 'I'\"; columns are, among others, {columns}",
        )

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()
