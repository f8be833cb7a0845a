"""What `builder filter` prints: what known images would pass, what passed by phase, why not, and what is lopsided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import pyarrow as pa

    from builder.quality.reference import Reference
    from builder.shards.criteria import Criteria, Judgement, Range
    from builder.shards.dataset import Dataset

SPOILT = 0.1  # more than this share of a kind of spoilt images must not pass
LOPSIDED = 10  # a phase of which fewer than a tenth of another phase's images is kept
UNEVEN = 0.15  # two phases' shares of real crops that pass a threshold differ by more than this

Tables = Mapping[str, "pa.Table"]


def print_yardstick(reference: Reference, criteria: Criteria) -> None:
    """What share of known images would pass thresholds, bands and gates: the honest scale of a threshold.

    --where, quantiles and duplicates are left out, for known images are no part of the dataset; so are scores that
    known images do not have. Shares by phase are those of the thresholds alone.
    """
    from builder.quality.reference import KINDS, yardstick_table
    from builder.shards.criteria import Criteria

    tables = yardstick_table(reference)
    unknown = {
        limit.column
        for limit in (*criteria.ranges, *criteria.gates)
        if all(table[limit.column].null_count == table.num_rows for table in tables.values())
    }
    ranges, gates = (
        tuple(limit for limit in limits if limit.column not in unknown) for limits in (criteria.ranges, criteria.gates)
    )
    codes = list(reference.yardstick) if ranges else []
    by_phase = "  thresholds alone, by phase" if codes else ""
    click.echo("\nknown images (the reference's yardsticks) that would pass:")
    click.echo(f"  {'':<28}{'thresholds alone':>18}{'with the gates':>18}{'N':>6}{by_phase}")
    spoilt = []
    for kind, table in tables.items():
        if not table.num_rows:
            continue  # no other phase, no held-out crop
        shares = _shares(table, Criteria(ranges), codes)
        gated = _share(table, Criteria(ranges, gates=gates))
        said = ", ".join(f"{code} {share:.0%}" for code, share in shares.items())
        click.echo(
            f"  {kind:<28}{_share(table, Criteria(ranges)):>18.1%}{gated:>18.1%}{table.num_rows:>6}  {said}".rstrip()
        )
        if kind in (KINDS["flat"], KINDS["blurred"], KINDS["noisy"]) and gated > SPOILT:
            spoilt.append(f"{kind} ({gated:.0%})")
    if unknown:
        click.echo(f"  (without {', '.join(sorted(unknown))}, which known images do not have)")
    if spoilt:
        click.echo(f"WARNING: what is in use lets pass {', '.join(spoilt)}: it does not tell them from wounds")
    for line in uneven_thresholds(tables[KINDS["real"]], ranges):
        click.echo(line)
    click.echo("")


def uneven_thresholds(real: pa.Table, ranges: tuple[Range, ...]) -> list[str]:
    """A line for each threshold that real crops of two phases pass unequally often, with one that treats them alike.

    A score's `_real_pct` says where an image lies among real crops of its own phase, so a threshold on it is as strict
    for every phase.
    """
    from builder.shards.criteria import Criteria
    from builder.shards.schema import SCORE_NAMES

    lines = []
    for limit in ranges:
        percentile = f"{limit.column}_real_pct"
        if percentile not in SCORE_NAMES or limit.phase is not None or not real.num_rows:
            continue
        shares = _shares(real, Criteria((limit,)), sorted(set(real["phase"].to_pylist())))
        most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
        if shares[most] - shares[least] > UNEVEN:
            asked = f"--min-{_option(limit.column)} {limit.low:g}" if limit.low is not None else ""
            asked += f" --max-{_option(limit.column)} {limit.high:g}" if limit.high is not None else ""
            lines.append(
                f"note: {asked.strip()} keeps {shares[most]:.0%} of real {most} crops and {shares[least]:.0%} of "
                f"{least}; as strict for every phase: {_by_percentile(limit, _share(real, Criteria((limit,))))}"
            )
    return lines


def _by_percentile(limit: Range, share: float) -> str:
    """The option on the score's percentile that keeps about this share of the real crops of every phase."""
    name, turned_away = _option(f"{limit.column}_real_pct"), 100 * (1 - share)
    if limit.low is not None and limit.high is not None:
        return f"--band {limit.column}_real_pct {turned_away / 2:.0f} {100 - turned_away / 2:.0f}"
    return f"--min-{name} {turned_away:.0f}" if limit.low is not None else f"--max-{name} {100 - turned_away:.0f}"


def _option(score: str) -> str:
    return score.replace("_", "-")


def _share(table: pa.Table, criteria: Criteria) -> float:
    from builder.shards.criteria import judge

    return float(judge(table, criteria).accepted.mean())


def _shares(table: pa.Table, criteria: Criteria, codes: list[str]) -> dict[str, float]:
    """The share that passes, by phase; without phases of which the table has no row."""
    from builder.shards.criteria import judge

    judgement = judge(table, criteria)
    rows = {code: judgement.of(code) for code in codes}
    return {code: float(judgement.accepted[own].mean()) for code, own in rows.items() if own.any()}


def print_judgement(judgement: Judgement, criteria: Criteria, source: Dataset) -> None:
    kept, rejected = judgement.kept, judgement.rejected
    click.echo(f"{'phase':<8}{'kept':>8}{'rejected':>10}{'share kept':>12}")
    for code in source.classes.codes:
        if kept[code] + rejected[code]:
            share = kept[code] / (kept[code] + rejected[code])
            click.echo(f"{code:<8}{kept[code]:>8,}{rejected[code]:>10,}{share:>12.1%}")
    total = len(judgement)
    click.echo(f"{'all':<8}{kept.total():>8,}{rejected.total():>10,}{kept.total() / max(1, total):>12.1%}")
    reasons = judgement.reason_counts()
    for (code, reason), times in sorted(reasons.items(), key=lambda item: (item[0][0], -item[1])):
        click.echo(f"  {code}: {reason}: {times:,}")
    for code, hard in _hard_shares(judgement).items() if criteria.keep_hard else ():
        short = f"; {criteria.keep_hard:.1%} was asked for, and there are no more" if hard < criteria.keep_hard else ""
        click.echo(f"  {code}: hard images: {hard:.1%} of what is kept, "
                   f"{judgement.readmitted[code]:,} of them re-admitted{short}")  # fmt: skip
    empty = [code for code in judgement.codes if not kept[code] and not reasons[code, "balance"]]
    if criteria.balance and empty:
        click.echo(f"  no image of phase {', '.join(empty)} passes: to balance, none of another phase stays")


def _hard_shares(judgement: Judgement) -> dict[str, float]:
    return {code: judgement.kept_hard[code] / kept for code, kept in sorted(judgement.kept.items())}


def lopsided(judgement: Judgement, source: Dataset) -> list[str]:
    """A warning for each phase of which nothing is kept, or less than a tenth of what is kept of another phase.

    A classifier would learn from such a dataset that the phase is rare, or does not exist. Each warning names the
    reason that turned most of the phase away, and what to do.
    """
    kept, rejected = judgement.kept, judgement.rejected
    largest, most = max(kept.items(), key=lambda item: item[1], default=("", 0))
    warnings = []
    for code in source.classes.codes:
        made = kept[code] + rejected[code]
        if not made or kept[code] * LOPSIDED >= most:
            continue
        what = f"no image of phase {code} is kept" if not kept[code] else f"only {kept[code]:,} images of phase {code} "
        what += "" if not kept[code] else f"are kept, less than a tenth of {largest}'s {most:,}"
        weights = ",".join(f"{each}={2 if each == code else 1}" for each in source.classes.codes)
        more = f"make more of it (`builder shards --weights {weights} --accepted`)"
        warnings.append(f"WARNING: {what}; {_remedy(judgement, code, made, more)}")
    return warnings


def _remedy(judgement: Judgement, code: str, made: int, more: str) -> str:
    """What turned most of a phase away, and what to do; `more`: how to make more of it."""
    from builder.shards.schema import SCORE_NAMES

    own = {reason: times for (phase, reason), times in judgement.reason_counts().items() if phase == code}
    if not own:
        return f"there are no more of it: {more}, or keep as many of each phase with --balance"
    reason, times = max(own.items(), key=lambda item: item[1])
    score = reason.split(" ")[0]
    said = f"{times:,} of {made:,} were turned away by '{reason}'"
    if score == "not":  # --where
        return f"{said}: loosen --where, or {more}"
    if score.endswith("_real_pct"):
        return f"{said}: lower that threshold, or {more}"
    if f"{score}_real_pct" in SCORE_NAMES and (" < " in reason or " > " in reason):
        bound = "min" if " < " in reason else "max"
        return f"{said}: give --{bound}-{_option(score)}-real-pct, which is as strict for every phase, or {more}"
    return f"{said}: look at them with `builder sheet`, or {more}"
