"""Foreign text on the terminal: names and values that others wrote are shown, and never change what the terminal does.

A name of a member, a key of a JSON or the message of a library may hold line ends, escape sequences (which recolour,
erase or retitle a terminal), marks that turn the writing direction, or bytes that are no text at all.
"""

from __future__ import annotations

import unicodedata
from typing import Any

LIMIT = 200  # characters of one foreign text in a message
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # Unicode categories: controls, surrogates, unassigned, line ends


def printable(text: Any, limit: int = LIMIT) -> str:
    """Text from elsewhere as one visible line.

    Args:
        text: A string, or anything else, of which `repr` is shown.
        limit: Characters that are shown at most; the middle of a longer text is left out.

    Returns:
        The text with every character that is not visible written as an escape (a newline as the two characters \\n).
    """
    text = text if isinstance(text, str) else repr(text)
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-(limit // 2) :]}"
    return "".join(map(_visible, text))


def printable_lines(text: str) -> str:
    """As `printable`, of a whole message of any length: its line ends stay."""
    return "\n".join("".join(map(_visible, line)) for line in text.split("\n"))


def _visible(character: str) -> str:
    if character.isascii():
        return character if character.isprintable() else repr(character)[1:-1]
    if unicodedata.category(character) in HIDDEN:
        return character.encode("unicode_escape").decode("ascii")
    return character
