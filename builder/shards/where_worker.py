"""The process that evaluates `--where`: a script of its own, which `shards.where` starts and, after its time, kills.

It gets a condition, then tables (Arrow IPC); for each it answers which rows satisfy it, or what is wrong. Frames are
8 bytes of length and a kind (one byte). It imports nothing of ours, so that it starts quickly.
"""

from __future__ import annotations

import resource
import struct
import sys
from typing import Any, BinaryIO

import duckdb
import numpy as np
import pyarrow as pa

HEADER = struct.Struct(">Qc")
CONDITION, TABLE, ROWS, WRONG, MEMORY = b"C", b"T", b"R", b"W", b"M"
ADDRESS_SPACE = 8 << 30  # bytes; code and allocators reserve much more than they use
CONFIG: dict[str, Any] = {
    "enable_external_access": "false",
    "python_enable_replacements": "false",
    "threads": 1,
    "memory_limit": "1GB",
    "temp_directory": "",
    "lock_configuration": "true",
}


def send(stream: BinaryIO, kind: bytes, payload: bytes) -> None:
    """Write one frame."""
    stream.write(HEADER.pack(len(payload), kind) + payload)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[bytes, bytes]:
    """Read one frame: its kind and payload. EOFError at the end."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise EOFError
    length, kind = HEADER.unpack(header)
    payload = stream.read(length)
    if len(payload) < length:
        raise EOFError
    return kind, payload


def satisfying(connection: Any, where: str, table: pa.Table) -> np.ndarray:
    """Which rows satisfy the SQL condition: bool [N]. Unknown counts as not."""
    numbered = table.append_column("row_number_", pa.array(np.arange(table.num_rows)))
    # A relation without a name: a subquery would see the rows of one shard alone, and so finds no table.
    found = connection.from_arrow(numbered).filter(f"coalesce(({where}), false)")
    rows = found.project("row_number_").fetchnumpy()["row_number_"]
    satisfied = np.zeros(table.num_rows, bool)
    satisfied[np.asarray(rows, np.int64)] = True
    return satisfied


def main() -> None:
    """Answer frames until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    given, answers = sys.stdin.buffer, sys.stdout.buffer
    connection, where = duckdb.connect(config=CONFIG), ""
    while True:
        try:
            kind, payload = receive(given)
        except EOFError:
            return
        if kind == CONDITION:
            where = payload.decode()
            continue
        try:
            table = pa.ipc.open_stream(payload).read_all()
            send(answers, ROWS, satisfying(connection, where, table).tobytes())
        except (duckdb.OutOfMemoryException, MemoryError):
            send(answers, MEMORY, b"")
        except (duckdb.Error, ValueError, RuntimeError) as error:
            said = str(error).splitlines() or [type(error).__name__]
            send(answers, WRONG, said[0].encode("utf-8", "backslashreplace"))


if __name__ == "__main__":
    main()
