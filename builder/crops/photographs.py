"""The photographs in a folder, and which one a table means by a file name."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path, PurePosixPath

from builder.errors import BuilderError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"})


class Photographs:
    """All photographs below a folder; each is known by its path relative to it, with '/'."""

    def __init__(self, root: Path, exclude: Path | None = None) -> None:
        """Find them; those below `exclude` (a masks folder) are left out. BuilderError when there are none."""
        if not root.is_dir():
            raise BuilderError(f"there is no folder {root}", "give the folder of the photographs")
        skipped = exclude.resolve() if exclude is not None else None
        found = (
            path
            for path in root.rglob("*")
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
            and not (skipped and path.resolve().is_relative_to(skipped))
        )  # fmt: skip
        self.root = root
        self.names = sorted(path.relative_to(root).as_posix() for path in found)
        if not self.names:
            raise BuilderError(
                f"no photographs found in {root}", f"its files must end in {', '.join(sorted(SUFFIXES))}"
            )
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            self._by_stem[without_suffix(PurePosixPath(name).name).lower()].append(name)

    def path(self, name: str) -> Path:
        return self.root / name

    def find(self, reference: str, where: str) -> str | None:
        """The photograph that `reference` means: a relative path, a file name, or either without its suffix.

        Folders may be written on either side only ('D/1.jpg' finds '1.jpg' and the reverse), but never contradict.
        None when it isn't there; BuilderError, naming `where`, when several photographs fit.
        """
        wanted = reference.replace("\\", "/").strip("/").lower()
        stem = without_suffix(PurePosixPath(wanted).name)
        fits = [
            name
            for name in self._by_stem.get(stem, [])
            if _same_end(without_suffix(name.lower()), without_suffix(wanted))
        ]
        for exact in (
            [name for name in fits if name.lower() == wanted],
            [name for name in fits if PurePosixPath(name.lower()).suffix == PurePosixPath(wanted).suffix],
            fits,
        ):
            if len(exact) == 1:
                return exact[0]
        if not fits:
            return None
        raise BuilderError(
            f"{where}: '{reference}' fits several photographs: {', '.join(fits[:3])}",
            f"write their paths relative to {self.root}, or pack a folder that holds only one of them",
        )


def without_suffix(name: str) -> str:
    """A path without its suffix, if that is an image's."""
    path = PurePosixPath(name)
    return path.with_suffix("").as_posix() if path.suffix.lower() in SUFFIXES else name


def _same_end(one: str, other: str) -> bool:
    return one == other or one.endswith("/" + other) or other.endswith("/" + one)
