"""The command line: one function a command. Mistakes of the user end in one message and exit code 2.

Command modules import the rooms inside their functions: `builder --help` must answer at once, and `verify` and
`filter` work without torch.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

import builder
from builder.cli.ablate import ablate
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
from builder.errors import BuilderError, Terminated


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        what = f"{error.filename or 'a file'} cannot be read or written: {error.strerror}"
        _fail(what, "make room, mend the permissions, or choose another --out; the same command continues")


def _fail(what: str, remedy: str) -> NoReturn:
    click.echo(f"error: {what}", err=True)
    if remedy:
        click.echo(f"       {remedy}", err=True)
    sys.exit(2)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Terminated
