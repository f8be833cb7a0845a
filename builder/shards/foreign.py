"""Foreign images become a dataset: WebDataset tars of others, or a folder of images in one folder per phase.

They are decoded and packed into shards of our own layout and codec, so that every command works on them and nobody
can tell them from others by their file. The name of the original stays in the column `source`.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import braceexpand
import numpy as np

from builder import __version__
from builder.config import fingerprint
from builder.display import printable
from builder.documents import parse_json
from builder.errors import BuilderError
from builder.images import DEFAULT_MAX_PIXELS, SUFFIXES, Header, ImageError, read_described
from builder.phases import ClassTable
from builder.shards.dataset import NAME, Dataset
from builder.shards.lock import exclusive
from builder.shards.sequential import Sequential
from builder.shards.storage import Storage
from builder.shards.stores import connect, explained
from builder.shards.tars import MAX_TEXT, TarError, read_members
from builder.shards.whole import all_or_nothing
from builder.shards.writer import IMAGES_PER_SHARD, Sample, encode_png, image_row, write_shards

IMAGES = tuple(sorted(SUFFIXES))  # endings of files and members that are taken for images
SAYS = (".cls", ".json", ".txt")  # members that say something of the image of the same stem
MAX_TARS = 1_000_000  # of one name with braces

Found = tuple[str, str, np.ndarray]  # phase, name of the original, pixels


def is_foreign(reference: str, out: str = ".") -> bool:
    """Whether `reference` means tars or a folder of images, not a dataset of ours under `out`, by name or path."""
    path = Path(reference)
    if reference.endswith(".tar") or any(mark in reference for mark in "*?{"):
        return True
    if not path.is_dir() or (path / "dataset.json").exists():
        return False
    if NAME.fullmatch(reference) and (dataset := Dataset(reference, Storage(out))).exists():
        # A killed run that adopted this very folder under its own name left it partial: it is adopted anew.
        return dataset.info["state"] != "complete" and dataset.info.get("adopted_from") == reference
    if path.parent.name == "shards" and (path.parent.parent / "manifests" / path.name / "dataset.json").exists():
        return False
    return any(path.glob("*.tar")) or any(_is_image(file) for file in path.glob("*/*"))


def adopt(
    source: str,
    name: str | None,
    storage: Storage,
    classes: ClassTable,
    *,
    origin: str = "synthetic",
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Dataset:
    """Pack foreign images into a new dataset `name` (default: the source's name) under `storage`.

    `source`: a folder with one folder of images per phase code, a folder of tars, a tar, or a glob of tars (fsspec
    URLs too). A tar holds images, each with a member of the same stem that says its class: .cls (label), .json
    (`label` or `phase`) or .txt (phase code or label). An image of more than `max_pixels` is refused.
    Raises BuilderError for what cannot be read or has no class, naming tar and member, and for a name that is taken.
    """
    dataset = Dataset(name or _name(source), storage)
    with exclusive(dataset):
        if dataset.exists():
            if dataset.info.get("adopted_from") != source:
                raise BuilderError(
                    f"dataset '{dataset.name}' exists already", "choose another --name, or remove it first"
                )
            if dataset.info["state"] == "complete":
                return dataset
        with all_or_nothing(dataset):
            info = foreign_info(dataset.name, classes, origin, {"adopted_from": source})
            dataset.write_info(info)
            count = _pack(source, dataset, classes, origin, max_pixels)
            dataset.write_info({**info, "state": "complete", "count": count})
    return dataset


def _pack(source: str, dataset: Dataset, classes: ClassTable, origin: str, max_pixels: int) -> int:
    counts: Counter[str] = Counter()

    def samples() -> Iterator[Sample]:
        for phase, original, pixels in _images(source, classes, max_pixels):
            key = f"{dataset.name}-{phase}-{counts[phase]:08d}"
            counts[phase] += 1
            row = {**image_row(key, phase, classes.label(phase), origin, pixels), "source": original}
            yield Sample(row, encode_png(pixels))

    write_shards(dataset.storage, dataset.name, samples(), IMAGES_PER_SHARD)
    if not counts:
        expected = f"expected {', '.join(IMAGES)} in tars or in folders {', '.join(classes.codes)}"
        raise BuilderError(f"{source} holds no images", expected)
    return counts.total()


def _name(source: str) -> str:
    path = PurePosixPath(source.rstrip("/"))
    stem = path.parent.name if any(mark in path.name for mark in "*?{") else path.name.removesuffix(".tar")
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "foreign"


def foreign_info(name: str, classes: ClassTable, origin: str, come: Mapping[str, Any]) -> dict[str, Any]:
    """dataset.json of what others made, of unknown lineage; `come` says from where, and what else decides the rows."""
    return {
        "name": name,
        "state": "partial",
        "origin": origin,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "classes": classes.to_json(),
        "count": 0,
        "config": {},
        "fingerprint": fingerprint({**come, "classes": classes.to_json()}),
        "lineage": {"known": False, "key_fingerprint": None, "patients": []},
        "parent": None,
        "licence": {"base": None, "data": None},
        "versions": {"builder": __version__},
        **come,
    }


def _images(source: str, classes: ClassTable, max_pixels: int) -> Iterator[Found]:
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.tar")):
        yield from _tree(folder, classes, max_pixels)
        return
    storage = Storage(".")
    for tar in find_tars([source], storage):
        yield from _tar(storage, tar, classes, max_pixels)


def find_tars(urls: Sequence[str], storage: Storage) -> list[str]:
    """The tars that `urls` mean, as manifests name them (see Storage.address), in order, each once.

    `urls`: paths or URLs, with braces ({000..099}) or globs; of a folder, all *.tar in it. BuilderError for one that
    means none.
    """
    found: dict[str, None] = {}
    for url in urls:
        try:
            expanded = list(itertools.islice(braceexpand.braceexpand(url), MAX_TARS + 1))
        except ValueError as error:
            raise BuilderError(
                f"'{printable(url)}' cannot be expanded: {error}", "close its braces, or quote it"
            ) from None
        if len(expanded) > MAX_TARS:
            raise BuilderError(f"'{printable(url)}' means more than {MAX_TARS:,} tars", "name fewer at once")
        for one in expanded:
            found.update(dict.fromkeys(_expand(one, storage)))
    return list(found)


def _expand(url: str, storage: Storage) -> list[str]:
    fs, path = connect(url)
    with explained(url):
        if fs.isfile(path):
            matches = [path]
        else:
            matches = sorted(fs.glob(f"{path.rstrip('/')}/*.tar" if fs.isdir(path) else path))
    if not matches:
        raise BuilderError(f"there are no tars at {printable(url)}", "check the path or the pattern")
    return [storage.address(fs, str(match)) for match in matches]


def _tree(folder: Path, classes: ClassTable, max_pixels: int) -> Iterator[Found]:
    others = {file.parent.name for file in folder.glob("*/*") if _is_image(file)} - set(classes.codes)
    if others:
        raise BuilderError(
            f"the images in {folder / min(others)} have no class",
            f"name their folder by one of {', '.join(classes.codes)}",
        )
    for code in classes.codes:
        for file in sorted((folder / code).glob("*")):
            if _is_image(file):
                original = f"{code}/{printable(file.name)}"
                yield code, original, read_foreign(file, printable(str(file)), max_pixels)[0]


def _is_image(file: Path) -> bool:
    """Whether a file is taken for an image: by its name, and not hidden, as what systems put beside images is."""
    return file.suffix.lower() in IMAGES and not file.name.startswith(".")


def _tar(storage: Storage, tar: str, classes: ClassTable, max_pixels: int) -> Iterator[Found]:
    shown = printable(PurePosixPath(tar).name)
    members: dict[str, bytes] = {}
    try:
        stamp = storage.stamp(tar)
        if stamp is None:
            raise BuilderError(f"there is no tar {printable(tar)}", "check the path or the pattern")
        with Sequential(storage, tar, 0, stamp[0]) as stream:
            for member in read_members(stream, stamp[0]):
                suffix = split_name(member.name)[1].lower()
                if suffix in IMAGES or suffix in SAYS:
                    members[member.name] = member.read(MAX_TEXT if suffix in SAYS else None)
    except (TarError, OSError) as error:
        raise BuilderError(f"{shown} is not a readable tar: {printable(str(error))}", "fetch it again") from None
    for name in sorted(members):
        stem, suffix = split_name(name)
        if suffix.lower() in IMAGES:
            said = {end: members[stem + end] for end in SAYS if stem + end in members}
            where = f"{printable(name)} in {shown}"
            pixels = read_foreign(members[name], where, max_pixels)[0]
            yield class_code(said, classes, where), printable(name), pixels


def split_name(member: str) -> tuple[str, str]:
    """WebDataset's rule: the stem ends at the first dot of the last path part."""
    folder, slash, last = member.rpartition("/")
    stem, dot, rest = last.partition(".")
    return folder + slash + stem, dot + rest


def class_code(said: Mapping[str, bytes], classes: ClassTable, where: str) -> str:
    """The phase code that the class members of an image (.cls, .json, .txt) say; BuilderError when none does.

    A .cls, and `label` of a .json, hold the index in the class table or else a code; `phase` and a .txt the other way
    round. It makes a difference where the codes are numbers.
    """
    value: object = None
    index_first = False
    try:
        if ".cls" in said:
            value, index_first = said[".cls"].decode().strip(), True
        elif ".json" in said:
            described = parse_json(said[".json"], "it")
            value = described.get("phase")
            if value is None:
                value, index_first = described.get("label"), True
        if value is None and ".txt" in said:
            value, index_first = said[".txt"].decode().strip(), False
    except (ValueError, AttributeError, BuilderError) as error:
        why = error.what if isinstance(error, BuilderError) else str(error)
        raise BuilderError(
            f"the class of {where} cannot be read: {printable(why)}", "mend its .cls, .json or .txt member"
        ) from None
    text = str(value)
    short = text.isdecimal() and len(text) <= 4
    by_index = classes.codes[int(text)] if short and int(text) < len(classes) else None
    by_code = text if value is not None and text in classes.codes else None
    meant = (by_index or by_code) if index_first else (by_code or by_index)
    if meant is not None:
        return meant
    known = ", ".join(classes.codes)
    problem = "has no class" if value is None else f"has the class '{printable(text, 40)}', which is none of {known}"
    raise BuilderError(f"{where} {problem}", f"give it a .cls member with a label from 0 to {len(classes) - 1}")


def read_foreign(picture: bytes | Path, where: str, max_pixels: int) -> tuple[np.ndarray, Header]:
    """The pixels of an image of others, and its header. BuilderError names `where` and the remedy."""
    try:
        return read_described(picture, max_pixels=max_pixels)
    except ImageError as error:
        raise BuilderError(f"the image {where} cannot be read: {error.reason}", error.remedy) from None
