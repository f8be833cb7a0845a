"""`builder checkpoint`: list, describe, choose, bring in, hand on and remove trained generators."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.cli.options import out_option
from builder.errors import BuilderError

if TYPE_CHECKING:
    from builder.models.checkpoint import Checkpoint

FILE = click.Path(path_type=Path)
MODE = click.Choice(["min", "max"])
NAME = "NAME|DIR|RUN:CHOICE"


@click.group()
def checkpoint() -> None:
    """Trained generators: NAME in ./checkpoints, a folder, or of a run RUN:best, :latest, :epoch=N, :step=N."""


@checkpoint.command("list")
def list_() -> None:
    """List the checkpoints in ./checkpoints, and the demo's."""
    from builder.models.checkpoint import all_checkpoints, read_checkpoint

    folders = all_checkpoints()
    if not folders:
        click.echo("no checkpoints; make one with `builder train`, or `builder checkpoint import`")
        return
    click.echo(f"{'name':<32}{'family':<8}{'method':<8}{'step':>9}{'epoch':>7}{'size':>10}  {'lineage':<14}metrics")
    for folder in folders:
        try:
            found = read_checkpoint(folder)
        except BuilderError as error:
            click.echo(f"{folder!s:<32}damaged: {error.what}")
            continue
        metrics = ", ".join(f"{key} {value:.4g}" for key, value in _numbers(found.metrics)[:3]) or "-"
        click.echo(
            f"{found.name:<32}{found.family:<8}{found.method:<8}{found.step or '-':>9}{found.epoch or '-':>7}"
            f"{_size(folder):>10}  {_lineage(found):<14}{metrics}"
        )


@checkpoint.command()
@click.argument("name", metavar=NAME)
def show(name: str) -> None:
    """Describe a checkpoint: where it comes from, what it was trained with, how it scored."""
    from builder.models.checkpoint import resolve
    from builder.models.integrity import damaged_files

    found = resolve(name)
    imported = found.config.get("imported", {})
    rows: list[tuple[str, Any]] = [
        ("name", found.name),
        ("folder", f"{found.path} ({_size(found.path)})"),
        ("sha256", found.sha256),
        ("family", found.family),
        ("method", found.method),
        ("base", " ".join(filter(None, (found.base.get("reference"), found.base.get("sha256", "")[:16]))) or "-"),
        ("imported", f"{imported['file']} ({imported['weights']} weights)" if imported else "-"),
        ("step, epoch", f"{found.step or '-'}, {found.epoch or '-'}"),
        ("created", found.created or "-"),
        ("lineage", _lineage(found)),
        ("licence", ", ".join(f"{key}: {value}" for key, value in found.licence.items()) or "-"),
    ]
    damaged = damaged_files(found.path, found.files)
    rows.append(("files", f"{len(found.files)}, as recorded" if found.files else "no checksums are recorded"))
    if damaged:
        rows[-1] = ("files", f"{len(damaged)} DAMAGED: {'; '.join(damaged)}")
    rows += [(f"prompt {code}", prompt) for code, prompt in found.prompts.items()]
    rows += [
        (f"sizes {code}", f"{min(sides)}-{max(sides)} px") for code, sides in found.original_sizes.items() if sides
    ]
    rows += [(f"metric {key}", f"{value:.6g}") for key, value in _numbers(found.metrics)]
    for key, value in rows:
        click.echo(f"{key:<20}{value}")


@checkpoint.command()
@click.argument("name", metavar="NAME|DIR|RUN[:CHOICE]")
def verify(name: str) -> None:
    """Compare all files of a checkpoint, or of a training RUN, with what was recorded; exit 1 when one differs."""
    from builder.models.checkpoint import find_run, resolve
    from builder.models.verification import verify_checkpoint

    if (run := find_run(name)) is not None:
        from builder.training.verification import verify_run

        where, report = run, verify_run(run)
    else:
        where = resolve(name).path
        report = verify_checkpoint(where)
    for note in report.notes:
        click.echo(f"note: {note}")
    for finding in report.findings:
        click.echo(finding)
    if report.findings:
        click.echo(f"{where}: {len(report.findings)} findings", err=True)
        sys.exit(1)
    click.echo(f"{where}: {report.files:,} files, all as they were recorded")


@checkpoint.command()
@click.argument("run")
@click.option("--monitor", default="", help="The metric to choose by. [default: the run's]")
@click.option("--mode", type=MODE, help="Lower (min) or higher (max) is better. [default: the run's]")
def best(run: str, monitor: str, mode: str | None) -> None:
    """Print the best checkpoint of a training RUN, and how it scored."""
    from builder.models.checkpoint import run_history

    folder = _run(run)
    history = run_history(folder)
    entry = history.best(monitor, mode or "")
    monitor = monitor or history.monitor
    click.echo(folder / entry.path)
    click.echo(
        f"{monitor} {entry.metrics[monitor]:.6g} ({mode or history.mode}) at step {entry.step}, epoch {entry.epoch}, "
        f"of {len(history.entries)} checkpoints",
        err=True,
    )


@checkpoint.command("import")
@click.argument("file", type=FILE)
@click.option("--base", required=True, metavar="NAME|DIR|HUB-ID", help="The model that it was trained from.")
@click.option("--download", is_flag=True, help="Fetch the base from the hub, once.")
@click.option("--to", "target", required=True, metavar="NAME|DIR", help="Name in ./checkpoints, or a folder.")
@click.option("--weights", type=click.Choice(["ema", "raw"]), help="Averaged or last. [default: as FILE says]")
@click.option("--lora-alpha", type=click.FloatRange(0, min_open=True), help="LoRA's alpha, if the file lacks it.")
@click.option("--history", type=FILE, help="The old checkpoint_history.json.")
@click.option("--trained-on", type=FILE, help="CSV of the patients it was trained on. [default: lineage unknown]")
@click.option(
    "--key-file", type=FILE, help="Secret of the patient hashes. [default: $BUILDER_PATIENT_KEY, else ROOT/patient.key]"
)
@out_option
def import_(
    file: Path, base: str, download: bool, target: str, weights: str | None, lora_alpha: float | None,
    history: Path | None, trained_on: Path | None, key_file: Path | None, out: str,
) -> None:  # fmt: skip
    """Bring in FILE.pt of the old system. Nothing in it is executed; every weight is accounted for."""
    from builder.models.checkpoint import FOLDER, Lineage
    from builder.models.importing import Request, import_legacy, patients_of
    from builder.models.source import locate

    found = locate(base, download)
    to = Path(target) if "/" in target else FOLDER / target

    lineage = Lineage()
    if trained_on is not None:
        from builder.identity import find_key
        from builder.shards.storage import Storage

        lineage = patients_of(trained_on, find_key(Storage(out), key_file), found)
    reference = found.reference if ":" in base else base  # RUN:best may be another one tomorrow
    request = Request(file, found, to, reference, weights or "", lora_alpha, history, lineage)
    made, notes = import_legacy(request)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    click.echo(
        f"checkpoint '{made.name}': epoch {made.epoch}, {made.config['imported']['weights']} weights, {made.method}, "
        f"lineage {_lineage(made)}, {_size(made.path)}"
    )
    if not lineage.known:
        click.echo("note: without --trained-on nothing can be judged against a split of real crops", err=True)


@checkpoint.command()
@click.argument("name", metavar=NAME)
@click.option("--to", "target", type=FILE, required=True, help="FILE.safetensors (the UNet alone), or a new folder.")
@click.option("--fuse", is_flag=True, help="Add the adapter (LoRA) to the weights: the base is no longer needed.")
def export(name: str, target: Path, fuse: bool) -> None:
    """Hand a checkpoint on as a folder or as one file."""
    from builder.models.checkpoint import resolve
    from builder.models.exporting import export as run

    found = resolve(name)
    run(found, target, fuse)
    click.echo(f"exported '{found.name}' to {target} ({_size(target)})")


@checkpoint.command()
@click.argument("run")
@click.option(
    "--keep", type=click.IntRange(0), required=True, metavar="N", help="Keep N besides the best and the last."
)
@click.option("--monitor", default="", help="The metric that says which is the best. [default: the run's]")
@click.option("--mode", type=MODE, help="Lower (min) or higher (max) is better. [default: the run's]")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def prune(run: str, keep: int, monitor: str, mode: str | None, dry_run: bool) -> None:
    """Remove the checkpoints of a training RUN, but never the best and the last."""
    from builder.models.prune import prune as remove

    removed = remove(_run(run), keep, monitor, mode or "", dry_run)
    for folder, size in removed:
        click.echo(f"{'would remove' if dry_run else 'removed'} {folder} ({_bytes(size)})")
    if not removed:
        click.echo("nothing to remove")


def _run(name: str) -> Path:
    from builder.models.checkpoint import find_run

    folder = find_run(name)
    if folder is None:
        raise BuilderError(
            f"there is no training run '{name}' with checkpoints", "`builder checkpoint list` shows what is there"
        )
    return folder


def _numbers(metrics: dict[str, Any]) -> list[tuple[str, float]]:
    return [(key, value) for key, value in metrics.items() if type(value) in (int, float)]


def _lineage(found: Checkpoint) -> str:
    return f"{len(found.lineage.patients)} patients" if found.lineage.known else "unknown"


def _size(path: Path) -> str:
    from builder.models.prune import folder_size

    return _bytes(path.stat().st_size if path.is_file() else folder_size(path))


def _bytes(count: int) -> str:
    size, units = float(count), ["B", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"
