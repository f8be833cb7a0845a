"""Whether the tokenizer of a model keeps the word that names the class in each prompt.

A CLIP tokenizer reads 77 tokens and drops the rest in silence. Where the class word stands behind them, the model never
sees it, and all classes look alike to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builder.errors import BuilderError
from builder.phases import ClassTable, Phase

SURELY_READ = 75  # of CLIP's 77 tokens; the others are the start and the end


def require_class_words(tokenizers: Sequence[Any], classes: ClassTable) -> None:
    """Refuse prompts that every tokenizer cuts off before their first class word.

    Class words are the class's name, `PHASE_<code>`, and its code (of two letters or more). In a prompt without any of
    these they are the words that the other classes' prompts don't have.

    Args:
        tokenizers: of the model, as transformers has them.
        classes: names and prompts.

    Raises:
        BuilderError: such prompts, all of them, with what is still read of each.
    """
    cut = [phase for phase in classes if not any(_keeps(tokenizer, phase, classes) for tokenizer in tokenizers)]
    if not cut:
        return
    limit = max(tokenizer.model_max_length for tokenizer in tokenizers)
    listed = ", ".join(f"{phase.code} ('{_class_words(phase, classes)[0]}')" for phase in cut)
    raise BuilderError(
        f"the tokenizer reads {limit} tokens of a prompt and cuts off the class word of {listed}",
        "put the class word first in the prompts of `classes:` in the config, or shorten them",
    )


def require_class_words_before_job(folder: Path, classes: ClassTable) -> None:
    """As `require_class_words`, with the tokenizers in a checkpoint's folder, before any worker starts.

    Prompts of 75 bytes or fewer are never cut, since a token is a byte or more: then nothing is loaded. An adapter and
    a single file have no tokenizers of their own; their prompts are checked when a worker loads them.
    """
    if all(len(phase.prompt.encode()) <= SURELY_READ for phase in classes):
        return
    names = [place.name for place in sorted(folder.glob("tokenizer*"))] if folder.is_dir() else []
    if names:
        from builder.models.load import load_tokenizers

        require_class_words(list(load_tokenizers(folder, names).values()), classes)


def _keeps(tokenizer: Any, phase: Phase, classes: ClassTable) -> bool:
    """Whether one of the prompt's class words is among the tokens that are read; True where it has none at all."""
    ends = [
        found.end()
        for word in _class_words(phase, classes)
        if (found := re.search(rf"(?<!\w){re.escape(word)}(?!\w)", phase.prompt, re.IGNORECASE))
    ]
    if not ends:
        return True
    limit = tokenizer.model_max_length
    read = tokenizer(phase.prompt[: min(ends)], truncation=True, max_length=limit + 1).input_ids  # with start and end
    return len(read) <= limit


def _class_words(phase: Phase, classes: ClassTable) -> list[str]:
    """The words of a prompt that tell its class, by preference; empty when nothing does."""
    named = [word for word in (phase.name, f"PHASE_{phase.code}", phase.code if len(phase.code) > 1 else "") if word]
    there = [word for word in named if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", phase.prompt, re.IGNORECASE)]
    if there:
        return there
    others = {word.casefold() for other in classes if other.code != phase.code for word in _words(other.prompt)}
    return [word for word in _words(phase.prompt) if word.casefold() not in others]


def _words(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt)
