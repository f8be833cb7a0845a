"""The options that say which images pass, shared by `builder filter` and `builder shards --accepted`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import click

from builder.cli.judgement import print_yardstick
from builder.errors import BuilderError, did_you_mean

if TYPE_CHECKING:
    from builder.quality.reference import Reference
    from builder.shards.criteria import Criteria, Quantile, Range
    from builder.shards.dataset import Dataset

F = TypeVar("F", bound=Callable[..., Any])

AUTO = "auto"


def _see_help(ctx: click.Context | None) -> str:
    return f"see `builder {ctx.info_name if ctx else 'filter'} --help`"


class Number(click.ParamType):
    """A finite number, in [low, high]."""

    name = "number"

    def __init__(self, low: float = -math.inf, high: float = math.inf, word: str = "") -> None:
        self.low, self.high, self.word = low, high, word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if self.word and value == self.word:
            return value
        option = param.opts[0] if param else "an option"
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            also = f" or '{self.word}'" if self.word else ""
            raise BuilderError(f"{option} needs a number{also}, not '{value}'", _see_help(ctx))
        if not self.low <= number <= self.high:
            raise BuilderError(f"{option}: {value} is not between {self.low:g} and {self.high:g}", "")
        return number


class Score(click.ParamType):
    """The name of a numeric score column."""

    name = "score"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from builder.shards.schema import NUMERIC_SCORES

        name = str(value).replace("-", "_")
        if name not in NUMERIC_SCORES:
            raise BuilderError(f"no such score: {value}", did_you_mean(name, NUMERIC_SCORES))
        return name


class CriteriaCommand(click.Command):
    """With --min-SCORE and --max-SCORE for every score; they are made on use, for the schema takes pyarrow."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *_bound_options()]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = [name for param in self.get_params(ctx) for name in param.opts if name.startswith("--")]
            raise BuilderError(f"no such option: {error.option_name}", did_you_mean(error.option_name, known)) from None
        except click.UsageError as error:
            raise BuilderError(error.format_message(), _see_help(ctx)) from None

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from builder.shards.schema import NUMERIC_SCORES

        with formatter.section("Scores"):
            formatter.write_text(", ".join(NUMERIC_SCORES))


@cache
def _bound_options() -> tuple[click.Option, ...]:
    """--min-SCORE and --max-SCORE; hidden, because the help lists the scores once."""
    from builder.shards.schema import NUMERIC_SCORES

    return tuple(
        click.Option(
            [f"--{bound}-{score.replace('_', '-')}", f"--{bound}-{score}", f"{bound}_{score}"],
            type=Number(word=AUTO) if (bound, score) == ("max", "copy_score") else Number(),
            hidden=True,
        )
        for score in NUMERIC_SCORES
        for bound in ("min", "max")
    )


def criteria_options(*, of_sets: bool) -> Callable[[F], F]:
    """All options that `Asked.of` takes but --min-SCORE and --max-SCORE, which `CriteriaCommand` adds.

    of_sets: whether the help shows those that need all images of a dataset to be there; where it does not, they are
    there to be refused with the reason.
    """
    options = [
        click.option(
            "--band", "bands", type=(Score(), Number(), Number()), multiple=True, metavar="SCORE LOW HIGH",
            help="A score in [LOW, HIGH], e.g. ssim_real_pct 5 95; may be repeated.",
        ),
        click.option(
            "--quantile", "quantiles", type=(Score(), Number(0, 1), Number(0, 1)), multiple=True,
            metavar="SCORE LOW HIGH", hidden=not of_sets,
            help="A score between two quantiles (0..1) of its phase in this dataset; may be repeated.",
        ),
        click.option(
            "--where", default="", metavar="SQL", help="A condition over the manifest, e.g. \"phase = 'I'\" (duckdb).",
        ),
        click.option("--no-duplicates", is_flag=True, help="Of images that repeat each other, the first alone."),
        click.option(
            "--keep-hard", type=Number(0, 1), default=0.0, metavar="SHARE", hidden=not of_sets,
            help="Thresholds, bands and quantiles leave at least this share of hard, correctly labelled images in each "
            "phase.",
        ),
        click.option(
            "--balance", is_flag=True, hidden=not of_sets, help="As many of each phase as of the one with the fewest.",
        ),
        click.option(
            "--no-gates", is_flag=True, help="Without the gates (flat, blurred, black images and copies may pass).",
        ),
    ]  # fmt: skip

    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


@dataclass(frozen=True)
class Asked:
    """What a command line asks of images. The gates come to it with the dataset: they stand in its reference."""

    ranges: tuple[Range, ...] = ()
    where: str = ""
    quantiles: tuple[Quantile, ...] = ()
    no_duplicates: bool = False
    keep_hard: float = 0.0
    balance: bool = False
    sanity: bool = True  # the gates
    copies: float | str | None = None  # the limit of copy_score: a number, auto, or None for that of the gates

    @classmethod
    def of(
        cls, *, bands: tuple[tuple[str, float, float], ...], quantiles: tuple[tuple[str, float, float], ...],
        where: str, no_duplicates: bool, keep_hard: float, balance: bool, no_gates: bool, **bounds: Any,
    ) -> Asked:  # fmt: skip
        """From the values of the options; BuilderError for bounds in the wrong order."""
        from builder.shards.criteria import Quantile

        for asked in quantiles:
            _require_order("--quantile", *asked)
        return cls(
            tuple(_ranges(bounds, bands)), where, tuple(Quantile(*asked) for asked in quantiles),
            no_duplicates, keep_hard, balance, not no_gates, bounds["max_copy_score"],
        )  # fmt: skip

    def criteria(self, gates: list[Range] | None = None) -> Criteria:
        """With the gates of a dataset (see `gates_in_use`), or without any."""
        from builder.shards.criteria import Criteria

        return Criteria(
            self.ranges, self.where, tuple(gates or ()), self.quantiles,
            self.no_duplicates, self.keep_hard, self.balance,
        )  # fmt: skip

    def criteria_for(self, source: Dataset) -> Criteria:
        """With the gates of `source`; prints what known images would score."""
        from builder.quality.reference import has_reference, load_reference

        reference = load_reference(source) if has_reference(source) else None
        criteria = self.criteria(gates_in_use(source, reference, sanity=self.sanity, copies=self.copies))
        if reference is not None:
            print_yardstick(reference, criteria)
        return criteria


def _ranges(bounds: dict[str, float | None], bands: tuple[tuple[str, float, float], ...]) -> list[Range]:
    """What --min-SCORE, --max-SCORE and --band ask for; --max-copy-score is a gate."""
    from builder.shards.criteria import Range
    from builder.shards.schema import NUMERIC_SCORES

    ranges = []
    for score in NUMERIC_SCORES:
        low, high = bounds[f"min_{score}"], bounds[f"max_{score}"]
        if isinstance(low, float) and isinstance(high, float):
            _require_order(f"--min-{score} and --max-{score}", score, low, high)
        if low is not None:
            ranges.append(Range(score, low=low, reason=f"{score} < {low:g}"))
        if high is not None and score != "copy_score":
            ranges.append(Range(score, high=high, reason=f"{score} > {high:g}"))
    for score, low, high in bands:
        _require_order("--band", score, low, high)
        ranges.append(Range(score, low, high, reason=f"{score} outside {low:g} to {high:g}"))
    return ranges


def _require_order(option: str, score: str, low: float, high: float) -> None:
    if low > high:
        raise BuilderError(f"{option}: {low:g} is above {high:g} ({score})", "give the lower bound first")


def gates_in_use(
    source: Dataset, reference: Reference | None, *, sanity: bool = True, copies: float | str | None = None
) -> list[Range]:
    """The sanity gates and the copy alarm; `copies`: None (as the other gates), auto, or another limit."""
    import numpy as np

    from builder.quality.gates import gate_ranges
    from builder.shards.criteria import Range

    remedy = f"run `builder score {source.name} --against REAL`; `builder filter --no-gates` does without"
    gates: list[Range] = []
    if sanity:
        if reference is None:
            raise BuilderError(f"'{source.name}' has no gates: it was never scored against real crops", remedy)
        gates += gate_ranges(reference.gates)
    if isinstance(copies, float):
        gates.append(Range("copy_score", high=copies, reason=f"copy_score > {copies:g}"))
    elif reference is not None and reference.copy and (sanity or copies == AUTO):
        # The threshold itself is an alarm.
        high = float(np.nextafter(np.float32(reference.copy["threshold"]), np.float32(-1)))
        gates.append(Range("copy_score", high=high, reason="copy of a training crop"))
    elif copies == AUTO:
        raise BuilderError(f"no alarm of copies was calibrated for '{source.name}'", remedy)
    elif sanity:
        click.echo("note: no alarm of copies was calibrated; copies of training crops are not turned away")
    return gates
