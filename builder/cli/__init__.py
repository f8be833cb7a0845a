"""The command line: one function a command. Mistakes of the user end in one message and exit code 2.

Command modules import the rooms inside their functions: `builder --help` must answer at once, and `verify` and
`filter` work without torch.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

import builder
from builder.cli.ablate import ablate
from builder.cli.arguments import BoundedGroup
from builder.cli.bench import bench
from builder.cli.checkpoint import checkpoint
from builder.cli.classify import classify
from builder.cli.config import config
from builder.cli.demo import demo
from builder.cli.doctor import doctor
from builder.cli.estimate import estimate
from builder.cli.filter import filter_
from builder.cli.index import index
from builder.cli.inspect import compact, list_, rm, sheet, verify
from builder.cli.metrics import floors, metrics
from builder.cli.mix import mix
from builder.cli.pack import pack
from builder.cli.score import score
from builder.cli.shards import regenerate, shards
from builder.cli.status import status
from builder.cli.train import train
from builder.cli.tune import tune_filter
from builder.display import printable_lines
from builder.errors import BuilderError, Terminated

ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
# A path of the user's that is something else than the command takes.
PATHS = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EEXIST,
    errno.ENODEV,
)  # fmt: skip


@click.group(cls=BoundedGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(builder.__version__, prog_name="builder")
def cli() -> None:
    """Offline builder of synthetic, phase-labelled wound crops.

    pack real crops -> train -> shards -> score -> filter -> mix (builder.mixing). Not for diagnosis.
    """


for command in (
    pack,
    train,
    ablate,
    checkpoint,
    shards,
    regenerate,
    status,
    score,
    metrics,
    floors,
    filter_,
    tune_filter,
    mix,
    classify,
    verify,
    compact,
    index,
    list_,
    rm,
    sheet,
    demo,
    bench,
    estimate,
    doctor,
    config,
):
    cli.add_command(command)


def main() -> NoReturn:
    """The console script `builder`."""
    signal.signal(signal.SIGTERM, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a file's name need not be text
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except BuilderError as error:
        _fail(error.what, error.remedy)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt) as stop:
        click.echo("\ninterrupted: what was committed is safe, and the same command continues", err=True)
        cause = stop.__cause__ or stop  # click makes an Abort of it
        sys.exit(cause.exit_code if isinstance(cause, Terminated) else 130)
    except BrokenPipeError:  # who read our output has seen enough (`builder list | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush would say so again
        sys.exit(1)
    except MemoryError:
        _fail("memory ran out", "take smaller batches, fewer workers, or a machine with more")
    except OSError as error:
        if error.errno in ROOM:
            remedy = "make room, mend the permissions, or choose another --out; the same command continues"
        elif error.errno in PATHS and error.filename is not None:
            remedy = "check the path: what it is, and whether it is there"
        else:
            raise
        _fail(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}", remedy)


def _fail(what: str, remedy: str) -> NoReturn:
    click.echo(f"error: {printable_lines(what)}", err=True)
    if remedy:
        click.echo(f"       {printable_lines(remedy)}", err=True)
    sys.exit(2)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Terminated
