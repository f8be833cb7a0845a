"""What lies below a folder: the images by name, and everything that was passed over, by reason."""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from builder.errors import BuilderError

# Made by systems and programs beside people's own files: previews, recycle bins, copies of an editor.
MACHINE_FOLDERS = frozenset(
    {"@eadir", "__macosx", "$recycle.bin", "system volume information", "lost+found", "#recycle", "@recycle"}
)
SHOWN = 5  # names that are written out of what was passed over


@dataclass
class Listing:
    """The files below a folder.

    images: paths relative to the folder, with '/', sorted. unread: suffix -> files whose name is no image's.
    hidden: files and folders that systems hide or make; they were not looked into. repeated: links to a folder that
    is read elsewhere, or that lies above; not followed. broken: links to nothing, and what is neither file nor folder.
    """

    images: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    hidden: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def passed_over(self, kind: str = "photographs") -> dict[str, tuple[int, str]]:
        """What was passed over: reason -> how many, and some of their names."""
        suffixes = ", ".join(f"{suffix} {count}" for suffix, count in self.unread.most_common(SHOWN))
        more = f", {len(self.unread) - SHOWN} other kinds" if len(self.unread) > SHOWN else ""
        return {
            f"files that are no {kind} by their name, passed over": (self.unread.total(), suffixes + more),
            f"hidden files and folders beside the {kind}, skipped": (len(self.hidden), _some(self.hidden)),
            "links to folders that are read already, not followed": (len(self.repeated), _some(self.repeated)),
            "broken links and special files, passed over": (len(self.broken), _some(self.broken)),
        }


def list_images(root: Path, suffixes: frozenset[str], exclude: Path | None = None) -> Listing:
    """Find the files below `root` whose suffix, in lower case, is in `suffixes`.

    Links to folders are followed, each folder is read once, and a link to a folder above `root` is never followed.
    A folder keeps its own place before a link to it. Hidden folders are skipped, and `exclude` is left out.

    Raises:
        BuilderError: a folder cannot be read.
    """
    listing = Listing()
    skipped = exclude.resolve() if exclude is not None else None
    above = {_identity(os.stat(folder)) for folder in (root.resolve(), *root.resolve().parents)}
    seen = {_identity(os.stat(root))}
    folders, links = deque([""]), deque[str]()
    while folders or links:
        relative = folders.popleft() if folders else links.popleft()
        is_link = relative != "" and (root / relative).is_symlink()
        if is_link:
            target = _identity(os.stat(root / relative))
            if target in seen or target in above:
                listing.repeated.append(relative)
                continue
            seen.add(target)
        for entry in _entries(root / relative):
            name = f"{relative}/{entry.name}" if relative else entry.name
            if entry.name.startswith(".") or entry.name.lower() in MACHINE_FOLDERS:
                listing.hidden.append(name)
                continue
            try:
                status = entry.stat()
            except OSError:
                listing.broken.append(name)
                continue
            if stat.S_ISDIR(status.st_mode):
                if skipped is not None and Path(entry.path).resolve() == skipped:
                    continue
                if entry.is_symlink():
                    links.append(name)
                elif _identity(status) in seen:
                    listing.repeated.append(name)
                else:
                    seen.add(_identity(status))
                    folders.append(name)
            elif not stat.S_ISREG(status.st_mode):
                listing.broken.append(name)
            elif PurePosixPath(name).suffix.lower() in suffixes:
                listing.images.append(name)
            else:
                listing.unread[PurePosixPath(name).suffix or "no suffix"] += 1
    listing.images.sort()
    return listing


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise BuilderError(f"the folder {folder} cannot be read: {error.strerror}", "mend its permissions") from None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
