"""What `builder train` and `builder shards` say, or refuse, before the work: the prompt study's lessons, and leaks.

The study: LoRA and full fine-tuning failed alike ("cartoonish"). What they shared were prompts so detailed that the
model answered from pretraining and not from the crops, guidance 12, and a perceptual loss that pulled towards
ImageNet's looks. Minimal prompts, guidance 3-5 and no perceptual loss cured both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from builder.config import Config
    from builder.models.checkpoint import Checkpoint
    from builder.phases import ClassTable
    from builder.shards.dataset import Dataset

MOST_WORDS = 12
MOST_GUIDANCE = 5.0

# Name -> why it matters; the name silences the finding.
GUARDS = {
    "prompt-style": (
        "words of style or quality call up pretraining's pictures in place of what the crops teach; "
        "name the class and nothing else (the negative prompt may have them)"
    ),
    "prompt-length": (
        "a long prompt is answered from pretraining and not from the crops; a token of its own and the name of the "
        "class are enough"
    ),
    "guidance": (
        f"uncond + g (cond - uncond) with g above {MOST_GUIDANCE:g} exaggerates the prompt over what was learned from "
        "the crops, and images lose variety; 3-5 is advised"
    ),
    "perceptual": (
        "its raw value is some 80 times the diffusion loss, and it pulls towards ImageNet's looks; "
        "train.perceptual_weight=0 turns it off"
    ),
    "prompts-differ": "the model is asked with words that it was not trained with, and answers from pretraining",
    "train-overlap": "yardsticks and figures taken from crops that were trained on flatter the generator",
}

STYLE = re.compile(
    r"""\b(?:
      (?:high(?:est)?|best|top|premium|super|superior|ultra|low|hi)[\s-]?
        (?:quality|resolution|res|definition|details?|detailed|fidelity)
    | (?:(?:highly|finely|ultra|hyper|extremely|intricately|very)[\s-])?detailed | intricate
    | (?:(?:photo|hyper|ultra)[\s-]?)?realis(?:tic|m) | true[\s-]to[\s-]life | lifelike
    | \d{1,2}k | uhd | (?:full|ultra)[\s-]hd | hdr | raw\s+photo(?:graph)? | dslr | bokeh | depth\s+of\s+field
    | masterpiece | award[\s-]winning | trending | artstation | stunning | beautiful | gorgeous | cinematic
    | professional(?:ly)? | vivid | (?:unreal\s+engine|octane)(?:\s+render)?
    | (?:sharp|crisp|perfect)\s+(?:focus|details?) | (?:tack|razor)[\s-]sharp
    | (?:clinical|studio|soft|dramatic|natural|perfect|volumetric)\s+light(?:ing)?
    | cartoon(?:ish)? | illustration | painting | anime | 3d\s+render | digital\s+art
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True)
class Finding:
    """Something that went wrong for others: `name` of GUARDS, `what` was seen here."""

    name: str
    what: str

    @property
    def why(self) -> str:
        return GUARDS[self.name]


def before_training(config: Config, real: Dataset) -> list[Finding]:
    """What to say before a training on `real` begins."""
    findings = [*_prompts(config.classes), *_guidance(config, fine_tuned=True)]
    if config.train.perceptual_weight > 0:
        what = f"perceptual loss is on (weight {config.train.perceptual_weight:g})"
        findings.append(Finding("perceptual", what))
    return [*findings, *_same_pixels(real)]


def before_job(config: Config, checkpoint: Checkpoint, real: Dataset) -> list[Finding]:
    """What to say before images are drawn from `checkpoint`, with `real` behind their scores."""
    from builder.shards.lineage import HELD_OUT, patients_of

    findings = [*_prompts(config.classes), *_guidance(config, fine_tuned=bool(checkpoint.classes or checkpoint.base))]
    weight = _perceptual_weight(checkpoint.config)
    if weight > 0:
        what = f"checkpoint '{checkpoint.name}' was trained with a perceptual loss (weight {weight:g})"
        findings.append(Finding("perceptual", what))
    findings += _other_prompts(config.classes, checkpoint)
    if shared := patients_of(real, HELD_OUT) & set(checkpoint.lineage.patients):
        what = f"checkpoint '{checkpoint.name}' was trained on {len(shared)} patients that '{real.name}' holds out"
        findings.append(Finding("train-overlap", what))
    return [*findings, *_same_pixels(real)]


def leak_of_training(config: Config, real: Dataset, base: Checkpoint | None) -> str | None:
    """How a training on `real` from `base` would see patients that it is to be judged on; None: it would not.

    What can't be known not to leak is a leak as well. A base that the config calls public has seen no patient of
    ours, unless its own lineage says otherwise.
    """
    from builder.identity import incomparable
    from builder.shards.lineage import HELD_OUT, first_few, leak_of, patients_of

    trained = patients_of(real, ("train",))
    lineage = real.info.get("lineage") or {}
    if None in trained or not lineage.get("known"):
        return f"patients of '{real.name}' are unknown: those that it holds out may stand in its training split too"
    held_out = patients_of(real, HELD_OUT)
    if shared := sorted(trained & held_out):
        return f"{len(shared)} patients of '{real.name}' are both trained on and held out: {first_few(shared)}"
    if why := incomparable(lineage, f"the training split of '{real.name}'", lineage, "those that it holds out"):
        return why
    if base is None:
        return None
    if config.model.base_lineage == "public" and not held_out & set(base.lineage.patients):
        return None
    return leak_of(asdict(base.lineage), f"the base '{base.name}'", real)


def leak_of_job(checkpoint: Checkpoint, real: Dataset) -> str | None:
    """How `checkpoint` saw, or may have seen, patients of `real` that its images are to be judged on; None: no way."""
    from builder.shards.lineage import leak_of

    return leak_of(asdict(checkpoint.lineage), f"checkpoint '{checkpoint.name}'", real)


def _prompts(classes: ClassTable) -> Iterable[Finding]:
    for phase in classes:
        style = list(dict.fromkeys(found.group().lower() for found in STYLE.finditer(phase.prompt)))
        if style:
            yield Finding("prompt-style", f"the prompt of {phase.code} has words of style or quality: {_listed(style)}")
        words = len(phase.prompt.split())
        if words > MOST_WORDS:
            what = f"the prompt of {phase.code} has {words} words, more than {MOST_WORDS}"
            yield Finding("prompt-length", what)


def _guidance(config: Config, fine_tuned: bool) -> Iterable[Finding]:
    if fine_tuned and config.sample.guidance > MOST_GUIDANCE:
        yield Finding("guidance", f"guidance is {config.sample.guidance:g}, with a model trained on these classes")


def _other_prompts(classes: ClassTable, checkpoint: Checkpoint) -> Iterable[Finding]:
    """Where it isn't known what a checkpoint was trained with, there is nothing to compare."""
    for phase in classes:
        trained = checkpoint.prompts.get(phase.code)
        if checkpoint.prompts and trained != phase.prompt:
            before = f"was trained with '{trained}'" if trained else "never saw this class"
            what = f"{phase.code} is asked for with '{phase.prompt}'; checkpoint '{checkpoint.name}' {before}"
            yield Finding("prompts-differ", what)


def _perceptual_weight(config: Mapping[str, Any]) -> float:
    """Of the perceptual loss in the config that a checkpoint was trained with: ours, or the old system's."""
    old = _section(config, "imported", "config", "quality", "perceptual_loss")
    weight = old.get("weight", 0) if old.get("enabled") else _section(config, "train").get("perceptual_weight", 0)
    return float(weight) if isinstance(weight, int | float) else 0.0


def _section(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    for key in keys:
        found = config.get(key)
        config = found if isinstance(found, Mapping) else {}
    return config


def _same_pixels(real: Dataset) -> Iterable[Finding]:
    """The same picture under two patients: a split by patient doesn't part what the patients don't tell apart."""
    pixels: dict[bool, set[str]] = {True: set(), False: set()}
    table = real.table(("split", "sha256"))
    for split, sha256 in zip(table["split"].to_pylist(), table["sha256"].to_pylist(), strict=True):
        if split:
            pixels[split == "train"].add(sha256)
    if same := len(pixels[True] & pixels[False]):
        yield Finding("train-overlap", f"{same} held-out crops of '{real.name}' have the very pixels of training crops")


def _listed(words: Iterable[str]) -> str:
    return ", ".join(f"'{word}'" for word in words)
