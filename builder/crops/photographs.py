"""The photographs in a folder, and which one a table means by a file name."""

from __future__ import annotations

import importlib.util
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from builder.crops.listing import list_images
from builder.errors import BuilderError
from builder.images import SUFFIXES

HEIF = frozenset({".heic", ".heif", ".hif"})
OLD_ENCODINGS = ("cp1252", "cp850", "mac_roman")  # of file names that zips from other systems leave behind


class Photographs:
    """All photographs below a folder; each is known by its path relative to it, with '/'.

    `listing` says what else lies there and was passed over.
    """

    def __init__(self, root: Path, exclude: Path | None = None, kind: str = "photographs") -> None:
        """Find them; those below `exclude` (a masks folder) are left out. `kind` is their word in messages.

        Raises:
            BuilderError: there is no such folder, or no image in it.
        """
        if not is_folder(root):
            raise BuilderError(f"there is no folder {root}", f"give the folder of the {kind}")
        if exclude is not None and root.resolve().is_relative_to(exclude.resolve()):
            raise BuilderError(
                f"the folder of masks {exclude} holds the {kind} {root}", "keep masks in a folder of their own"
            )
        self.root = root
        self.listing = list_images(root, readable_suffixes(), exclude)
        self.names = self.listing.images
        if not self.names:
            passed = self.listing.passed_over(kind)
            there = "; ".join(f"{what}: {names}" for what, (count, names) in passed.items() if count)
            raise BuilderError(
                f"no {kind} found in {root}" + (f" ({there})" if there else ""),
                f"its files must end in {', '.join(sorted(readable_suffixes()))}",
            )
        self._indices: dict[int, dict[str, list[tuple[str, str]]]] = {}

    def path(self, name: str) -> Path:
        return self.root / name

    def find(self, reference: str, where: str) -> str | None:
        """The photograph that `reference` means: a relative path, a file name, or either without its suffix.

        What is written the same counts first; then Unicode's composed form, any case, and another suffix or none.
        Folders may be written on either side only ('D/1.jpg' finds '1.jpg' and the reverse), but never contradict.
        None when it isn't there; BuilderError, naming `where`, when several photographs fit.
        """
        wanted = reference.replace("\\", "/").removeprefix("./").strip("/")
        for step, spelling in enumerate(_SPELLINGS):
            text = spelling(wanted)
            candidates = self._index(step).get(text.rpartition("/")[2], [])
            same_path = {name for path, name in candidates if path == text}
            fits = same_path if len(same_path) == 1 else {name for path, name in candidates if _same_end(path, text)}
            if len(fits) == 1:
                return fits.pop()
            if fits:
                raise BuilderError(
                    f"{where}: '{reference}' fits several photographs: {', '.join(sorted(fits)[:3])}",
                    f"write their paths relative to {self.root} with exact case and suffix, or rename one of them",
                )
        return None

    def _index(self, step: int) -> dict[str, list[tuple[str, str]]]:
        """File name in the spelling of `step` -> (path in that spelling, photograph)."""
        if step not in self._indices:
            index = defaultdict(list)
            for name in self.names:
                for readable in (name,) if step == 0 else _readable(name):
                    path = _SPELLINGS[step](readable)
                    index[path.rpartition("/")[2]].append((path, name))
            self._indices[step] = index
        return self._indices[step]


def readable_suffixes() -> frozenset[str]:
    """Endings of the files that are taken for pictures; HEIC's only where the library that reads it is installed."""
    return SUFFIXES if importlib.util.find_spec("pillow_heif") else SUFFIXES - HEIF


def heif_remedy(suffixes: Iterable[str]) -> str:
    """What to do about HEIC files that were passed over; '' where none is among `suffixes`."""
    passed = {suffix.lower() for suffix in suffixes} & (HEIF - readable_suffixes())
    return f"to read {', '.join(sorted(passed))}, install pillow-heif, or save them as JPEG" if passed else ""


def is_folder(path: Path) -> bool:
    """Whether a path is a folder. A name that no file system takes (300 characters, a NUL byte) is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def without_suffix(name: str) -> str:
    """A path without its suffix, if that is an image's."""
    path = PurePosixPath(name)
    return path.with_suffix("").as_posix() if path.suffix.lower() in SUFFIXES else name


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(_composed(name).casefold())


# The spellings in which a name is looked for, one after the other.
_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    _composed,
    _folded,
    lambda name: without_suffix(_composed(name)),
    lambda name: without_suffix(_folded(name)),
)


def _readable(name: str) -> Iterator[str]:
    """The name; one that isn't UTF-8 (Python escapes its bytes) also as older systems would have read it."""
    yield name
    raw = name.encode("utf-8", "surrogateescape")
    if name.isascii() or raw == name.encode("utf-8", "replace"):
        return
    for encoding in OLD_ENCODINGS:
        yield raw.decode(encoding, "replace")


def _same_end(one: str, other: str) -> bool:
    return one == other or one.endswith("/" + other) or other.endswith("/" + one)
