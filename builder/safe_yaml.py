"""YAML of configs, read within bounds: no tags, no key twice, few anchors, little nesting.

YAML lets a file of a few lines stand for gigabytes (anchors within anchors), lets the second of two equal keys win
silently, and lets tags name types. A config needs none of these.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.events import AliasEvent, MappingStartEvent, NodeEvent, ScalarEvent, SequenceStartEvent

from builder.display import printable
from builder.errors import BuilderError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ALIASES = 1000
MAX_NODES = 100_000  # of the text itself, and of what it stands for once anchors are written out
MAX_DIGITS = 40  # of a number: more are no number of ours, and reading them takes time
MERGE = "tag:yaml.org,2002:merge"  # the key <<
VALUES = (ScalarEvent, SequenceStartEvent, MappingStartEvent)
NUMBER = re.compile(r"[+-]?[0-9][0-9A-Za-z_:.]*")


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a key that stands twice, or that is no text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise yaml.constructor.ConstructorError(None, None, "a key is no text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{printable(str(key), 60)}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str | bytes, what: str, remedy: str) -> Any:
    """Plain data of a YAML document.

    Args:
        text: The document; bytes are UTF-8 (or UTF-16 with its mark).
        what: Its name in messages.
        remedy: What to do when it can't be read.

    Raises:
        BuilderError: it is no YAML, too large, nested too deeply, has a key twice, or a tag.
    """
    what = printable(what)
    if len(text) > MAX_BYTES:
        raise BuilderError(f"{what} has more than {MAX_BYTES:,} bytes", remedy)
    try:
        _require_bounded(text)
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError) as error:
        # ValueError and OverflowError: dates and numbers that are none
        raise BuilderError(f"{what} is not valid YAML: {_said(error)}", remedy) from None


def _require_bounded(text: str | bytes) -> None:
    """Look at the document's events, which takes no memory, before anything is built from them."""
    depth = aliases = nodes = 0
    sizes: dict[str, int] = {}  # nodes that an anchor stands for
    opened: list[tuple[str | None, int]] = []  # anchor of each collection that is open, and the nodes before it
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, NodeEvent):
            nodes += 1
        if isinstance(event, VALUES) and event.tag not in (None, "!"):
            raise ValueError(f"the tag {event.tag} is not read")
        if isinstance(event, AliasEvent):
            aliases += 1
            if any(anchor == event.anchor for anchor, _ in opened):
                raise ValueError(f"the anchor {event.anchor} stands within itself")
            nodes += sizes.get(str(event.anchor), 0)
        elif isinstance(event, ScalarEvent):
            if event.anchor:
                sizes[event.anchor] = 1
            if event.style is None and len(event.value) > MAX_DIGITS and NUMBER.fullmatch(event.value):
                raise ValueError(f"the number {event.value[:20]}... has {len(event.value)} digits")
        elif isinstance(event, (SequenceStartEvent, MappingStartEvent)):
            opened.append((event.anchor, nodes))
            depth = max(depth, len(opened))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = nodes - before + 1
        if nodes > MAX_NODES or aliases > MAX_ALIASES:
            raise ValueError(f"it stands for more than {MAX_NODES:,} values, or has more than {MAX_ALIASES:,} aliases")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _said(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return printable(" ".join(str(error).split()), 300)
