"""A prompt whose class word the tokenizer cuts off is refused before training and before a job."""

import dataclasses

import pytest

from builder.config import Config, load_config
from builder.errors import BuilderError
from builder.models.building import clip_tokenizer
from builder.phases import HEALING_PHASES, ClassTable, Phase
from builder.sampling.class_words import require_class_words, require_class_words_before_job

LONG = "a very detailed clinical photograph of a foot, in the middle of the picture, " * 8
COLOURS = {"I": "red", "P": "pink", "R": "pale"}


def prompts(make) -> ClassTable:
    return ClassTable([Phase(phase.code, phase.name, make(phase)) for phase in HEALING_PHASES])


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer("!")


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (lambda phase: phase.prompt, False),
        (lambda phase: phase.prompt + LONG, False),
        (lambda phase: f"{phase.name} {LONG}", False),
        (lambda phase: f"PHASE_{phase.code} {LONG} {phase.name}", False),  # the first class word is read
        (lambda phase: "wound", False),  # one prompt for all classes is the user's own choice
        (lambda phase: LONG + phase.name, True),
        (lambda phase: LONG + phase.prompt, True),
        (lambda phase: LONG + phase.name.upper() + " phase", True),
        (lambda phase: LONG + COLOURS[phase.code], True),  # no name: the words that differ
        (lambda phase: f"{COLOURS[phase.code]} {LONG}", False),
        (lambda phase: f"I see {LONG} {phase.name}", True),  # a code of one letter is a word of English
    ],
)
def test_a_class_word_beyond_the_tokenizers_reach(tokenizer, make, refused):
    if refused:
        with pytest.raises(BuilderError, match=r"reads 77 tokens .* cuts off the class word of I .*P .*R"):
            require_class_words([tokenizer], prompts(make))
    else:
        require_class_words([tokenizer], prompts(make))


def test_the_last_token_that_is_read_counts(tokenizer):
    """75 tokens are read between the start and the end."""
    word = len(tokenizer("inflammatory").input_ids) - 2
    for filler, fits in ((75 - word, True), (76 - word, False)):
        table = ClassTable([Phase("I", "inflammatory", "a " * filler + "inflammatory")])
        if fits:
            require_class_words([tokenizer], table)
        else:
            with pytest.raises(BuilderError, match="cuts off"):
                require_class_words([tokenizer], table)


def cut_off(config: Config) -> Config:
    return dataclasses.replace(config, classes=prompts(lambda phase: LONG + phase.name))


def test_training_and_sampling_refuse_it(tiny_checkpoint):
    from builder.models.checkpoint import resolve
    from builder.sampling.sampler import load_sampler
    from builder.training.start import start

    config = load_config("demo", ["train.size=16", "sample.size=16"])
    with pytest.raises(BuilderError, match="cuts off the class word"):
        start(cut_off(config))
    checkpoint = resolve(str(tiny_checkpoint)).path
    require_class_words_before_job(checkpoint, config.classes)
    with pytest.raises(BuilderError, match="cuts off the class word"):
        require_class_words_before_job(checkpoint, cut_off(config).classes)
    with pytest.raises(BuilderError, match="cuts off the class word"):
        load_sampler(resolve(str(tiny_checkpoint)), cut_off(config))
