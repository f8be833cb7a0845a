"""6,000 damaged, odd and misnamed pictures through the doors of the product: what ends how.

Run `python -m tests.acceptance.fuzz_images [--cases 6000] [--seed 0]`. It prints a table and exits with 1 unless

- no case ends in a traceback, or takes longer than 60 s,
- no picture that lost something (cut short; its end zeroed; a bit flipped, where the format has checksums) is read as
  other pixels than it had,
- no sound picture (another EXIF block, name, or bytes behind its end) is refused or changed, but for EXIF's turn.

Formats without checksums can't tell every flipped bit; what was read as other pixels there is counted, not judged.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np

from builder.crops.pack import PackRequest, pack
from builder.crops.photographs import HEIF
from builder.errors import BuilderError
from builder.images import SUFFIXES, read_pixels
from builder.shards.dataset import Dataset
from builder.shards.storage import Storage
from tests import doors
from tests.pictures import RGB, chunk, encoded, exif, read_kinds

LIMIT_S = 60
SHOWN = 5  # failures of each kind that are printed


class HangError(Exception):
    """A case took longer than LIMIT_S."""


@dataclass(frozen=True)
class Case:
    """One input. expected: the pixels of the sound picture."""

    mutation: str
    kind: str
    picture: bytes
    suffix: str
    expected: np.ndarray


SOUND = {
    kind: (picture, read_pixels(picture))
    for kind, (picture, _, _) in read_kinds().items()
    if not any(word in kind for word in ("behind", "animated", "pages", "mpo", "text"))  # of these a part may be lost
}


def _format(picture: bytes) -> str:
    names = {b"\x89PNG": "png", b"\xff\xd8\xff\xe0": "jpeg", b"\xff\xd8\xff\xe1": "jpeg", b"\xff\xd8\xff\xee": "jpeg"}
    names |= {b"RIFF": "webp", b"GIF8": "gif"}
    return names.get(picture[:4], "bmp" if picture[:2] == b"BM" else "tiff")


# -- mutations: of a picture, another one ------------------------------------------------------------------------------


def other_exif(picture: bytes, draw: random.Random) -> bytes:
    """With an EXIF block of which some bytes are drawn."""
    block = bytearray(exif(draw.randint(1, 8), *[_entry(draw) for _ in range(draw.randint(0, 6))]))
    for _ in range(draw.choice([0, 1, 3, 10, len(block)])):
        block[draw.randrange(len(block))] = draw.randrange(256)
    del block[draw.choice([len(block), draw.randrange(len(block))]) :]
    return _with_exif(picture, bytes(block))


def _entry(draw: random.Random) -> tuple[int, int, int, bytes]:
    tags = [0x0112, 0x0132, 0x011A, 0x0213, 0x8769, 0x8825, 0x927C, 0xA005, draw.randrange(1 << 16)]
    return draw.choice(tags), draw.randrange(16), draw.choice([0, 1, 7, 1 << 31, (1 << 32) - 1]), draw.randbytes(4)


def _with_exif(picture: bytes, block: bytes) -> bytes:
    kind = _format(picture)
    if kind == "png":
        return picture[:33] + chunk(b"eXIf", block) + picture[33:]
    if kind == "jpeg":
        return picture[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + picture[2:]
    if kind == "webp":
        added = b"EXIF" + struct.pack("<I", len(block)) + block + b"\0" * (len(block) % 2)
        return picture[:4] + struct.pack("<I", len(picture) - 8 + len(added)) + picture[8:] + added
    return picture + block  # BMP, GIF and TIFF: bytes behind the end


def other_name(picture: bytes, draw: random.Random) -> bytes:
    """As it is; `run` draws its name."""
    return picture


def bytes_behind(picture: bytes, draw: random.Random) -> bytes:
    return picture + draw.choice([b"\0" * 99, draw.randbytes(99), picture, b"\xff\xd8\xff\xd9", b"\r\n"])


def odd_tags(picture: bytes, draw: random.Random) -> bytes:
    """A TIFF whose tags of text and resolution are drawn; of other formats, a chunk or segment nobody knows."""
    kind, junk = _format(picture), draw.randbytes(draw.randint(0, 40))
    if kind == "png":
        names = [b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"acTL", b"fcTL", b"fdAT", b"tIME", b"gAMA", b"vpAg", b"iCCP"]
        return picture[:33] + chunk(draw.choice(names), junk) + picture[33:]
    if kind == "jpeg":
        marker = draw.choice([0xE0, 0xE1, 0xE2, 0xE3, 0xED, 0xFE])
        return picture[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(junk) + 2) + junk + picture[2:]
    if kind == "webp":
        added = draw.choice([b"XMP ", b"ICCP", b"EXIF", b"abcd"]) + struct.pack("<I", len(junk)) + junk
        added += b"\0" * (len(junk) % 2)
        return picture[:4] + struct.pack("<I", len(picture) - 8 + len(added)) + picture[8:] + added
    if kind == "tiff" and picture[2:4] in (b"*\0", b"\0*"):
        return _tiff_with_junk(picture, draw)
    return picture


def _tiff_with_junk(picture: bytes, draw: random.Random) -> bytes:
    end = "<" if picture[:2] == b"II" else ">"
    start = struct.unpack(end + "I", picture[4:8])[0]
    count = struct.unpack(end + "H", picture[start : start + 2])[0]
    entries = [picture[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    tags = {struct.unpack(end + "H", entry[:2])[0] for entry in entries}
    for tag in {270, 282, 283, 296, 305, 306, 315, 700, 33432, 34377, 34665, 34853, 50341} - tags:
        if draw.random() < 0.5:
            entries.append(
                struct.pack(end + "HHI", tag, draw.randrange(14), draw.randrange(1 << 10)) + draw.randbytes(4)
            )
    entries.sort(key=lambda entry: struct.unpack(end + "H", entry[:2]))
    place = len(picture) + len(picture) % 2
    head = picture[:4] + struct.pack(end + "I", place) + picture[8:] + b"\0" * (len(picture) % 2)
    return head + struct.pack(end + "H", len(entries)) + b"".join(entries) + draw.randbytes(4)


def cut_short(picture: bytes, draw: random.Random) -> bytes:
    return picture[: draw.randrange(len(picture) - 4)]


def zeroed_end(picture: bytes, draw: random.Random) -> bytes:
    kept = draw.randrange(len(picture) - 12)
    return picture[:kept] + bytes(len(picture) - kept)


def flipped_bits(picture: bytes, draw: random.Random) -> bytes:
    data = bytearray(picture)
    for _ in range(draw.choice([1, 1, 1, 4, 16])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def other_numbers(picture: bytes, draw: random.Random) -> bytes:
    """Lengths, offsets, sizes and counts in the first part of the file, where formats have them, replaced."""
    data = bytearray(picture)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(min(len(data) - 4, 400))
        width = draw.choice([1, 2, 4])
        value = draw.choice([0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, draw.randrange(1 << 32)])
        data[place : place + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, draw.choice(["little", "big"]))
    return bytes(data)


def spliced(picture: bytes, draw: random.Random) -> bytes:
    """The head of one picture, the tail of another; or a part of it twice, or taken out."""
    other = draw.choice(list(SOUND.values()))[0]
    here, there = draw.randrange(len(picture)), draw.randrange(len(other))
    return draw.choice(
        [picture[:here] + other[there:], picture[:here] + picture[here // 2 :], picture[:there] + picture[here:]]
    )


Mutation = Callable[[bytes, random.Random], bytes]
SOUND_STILL: dict[str, Mutation] = {
    "another EXIF block": other_exif,
    "another name": other_name,
    "bytes behind its end": bytes_behind,
    "odd tags, texts, chunks": odd_tags,
}
LOST: dict[str, Mutation] = {"cut short": cut_short, "its end zeroed": zeroed_end}
ANY: dict[str, Mutation] = {"flipped bits": flipped_bits, "other numbers": other_numbers, "spliced": spliced}
MUTATIONS = {**SOUND_STILL, **LOST, **ANY}
CHECKED = {"cut short": {"png", "jpeg", "webp", "tiff", "bmp", "gif"}, "its end zeroed": {"png", "jpeg", "gif"}}
CHECKED["flipped bits"] = {"png"}


# -- doors -------------------------------------------------------------------------------------------------------------


def by_masks(folder: Path, pictures: doors.Pictures, suffix: str) -> doors.Pixels:
    """As the mask of a photograph of its size."""
    for name, data in (("photographs/K0/a.png", encoded(RGB)), (f"masks/a{suffix}", *pictures.values())):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(data)
    request = PackRequest(
        folder / "photographs", folder / "masks", classes=doors.table(pictures), group_by="photograph", key=doors.SECRET
    )
    pack(request, Dataset("packed", Storage(folder)), progress=False)
    return {}


def by_index_and_loader(folder: Path, pictures: doors.Pictures, suffix: str) -> doors.Pixels:
    dataset = doors.indexed(folder, pictures, suffix)
    found = doors.by_loader(dataset)
    streamed = doors.by_stream(dataset)
    if not (found["K0"] == streamed["K0"]).all():
        raise AssertionError("the two readers give other pixels")
    return found


DOORS: dict[str, Callable[[Path, doors.Pictures, str], doors.Pixels]] = {
    "pack": doors.by_pack,
    "masks": by_masks,
    "index, loader, stream": by_index_and_loader,
    "score of a folder": doors.by_score_of_a_folder,
    "score of a tar": doors.by_score_of_a_tar,
}


# -- running -----------------------------------------------------------------------------------------------------------


def drawn(number: int, seed: int) -> Case:
    """Case `number` of a run; it depends on (number, seed) alone."""
    draw = random.Random(f"{seed}/{number}")
    mutation = list(MUTATIONS)[number % len(MUTATIONS)]
    kind = draw.choice(list(SOUND))
    picture, expected = SOUND[kind]
    suffix = draw.choice(sorted(SUFFIXES - HEIF)) if mutation == "another name" else ".png"
    return Case(mutation, kind, MUTATIONS[mutation](picture, draw), suffix, expected)


def judged(case: Case, found: np.ndarray | None) -> str:
    """What it means that a case was read."""
    if found is None:
        return "read"
    same = found.shape == case.expected.shape and bool((found == case.expected).all())
    if same:
        return "read"
    turned = [np.rot90(flipped, turn) for flipped in (found, found[:, ::-1]) for turn in range(4)]
    is_turned = any(each.shape == case.expected.shape and (each == case.expected).all() for each in turned)
    if case.mutation in SOUND_STILL:
        has_profile = "profile" in case.kind or case.mutation == "odd tags, texts, chunks"
        return "read" if is_turned or has_profile else "changed though sound"
    if is_turned and "turned" in case.kind:
        return "read"  # the bit stood in EXIF, of which only the turn counts
    return "read though damaged" if _format_of(case) in CHECKED.get(case.mutation, ()) else "other pixels, no checksum"


def _format_of(case: Case) -> str:
    return _format(SOUND[case.kind][0])


def run(case: Case, door: str) -> tuple[str, str]:
    """How a case ends, and what there is to say of it."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        found = DOORS[door](folder, {"it": case.picture}, case.suffix)
        return judged(case, found.get("K0")), ""
    except HangError:
        return "hang", ""
    except BuilderError as error:
        lossless = door != "masks"  # what a sound picture means as a mask is judged elsewhere
        return ("sound refused" if case.mutation in SOUND_STILL and lossless else "refused"), error.what
    except Exception:  # the very thing that is looked for
        return "traceback", traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        shutil.rmtree(folder, ignore_errors=True)


BAD = ("traceback", "hang", "read though damaged", "sound refused", "changed though sound")
COLUMNS = ("read", "refused", "other pixels, no checksum", *BAD)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def too_long(number: int, frame: FrameType | None) -> None:
        raise HangError

    signal.signal(signal.SIGALRM, too_long)
    counts: Counter[tuple[str, str]] = Counter()
    begun, slowest = time.monotonic(), 0.0
    for number in range(options.cases):
        case = drawn(number, options.seed)
        door = list(DOORS)[number // len(MUTATIONS) % len(DOORS)]
        start = time.monotonic()
        end, said = run(case, door)
        slowest = max(slowest, time.monotonic() - start)
        counts[case.mutation, end] += 1
        if end in BAD and counts[case.mutation, end] <= SHOWN:
            print(f"case {number} of seed {options.seed}: {case.kind}, {case.mutation}, by {door}: {end}\n{said}")
    _print(counts, options.cases, time.monotonic() - begun, slowest)
    return int(any(end in BAD for _, end in counts.elements()))


def _print(counts: Counter[tuple[str, str]], cases: int, seconds: float, slowest: float) -> None:
    width = max(map(len, MUTATIONS))
    print(f"{'':{width}}  cases  " + "  ".join(COLUMNS))
    for mutation in MUTATIONS:
        row = [counts[mutation, end] for end in COLUMNS]
        cells = "  ".join(f"{value:{len(end)}}" for value, end in zip(row, COLUMNS, strict=True))
        print(f"{mutation:{width}}  {sum(row):5}  {cells}")
    totals = [sum(counts[mutation, end] for mutation in MUTATIONS) for end in COLUMNS]
    print(
        f"{'all':{width}}  {cases:5}  " + "  ".join(f"{v:{len(end)}}" for v, end in zip(totals, COLUMNS, strict=True))
    )
    print(
        f"{len(SOUND)} kinds of sound pictures, {len(DOORS)} doors; {seconds:.0f} s, the slowest case {slowest:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
