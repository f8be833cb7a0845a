"""The text of a table file, whatever program and system wrote it."""

from __future__ import annotations

import codecs
from pathlib import Path

from builder.errors import BuilderError

# The encodings that spreadsheets write where they don't write UTF-8: Windows, DOS ("CSV (MS-DOS)"), Mac.
OLD_ENCODINGS = ("cp1252", "cp850", "mac_roman")
_MARKS = (  # the longer marks first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NOT_TEXT = (
    (b"PK\x03\x04", "an Excel or LibreOffice workbook, or another zip archive"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook (.xls)"),
    (b"%PDF", "a PDF"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"PAR1", "a Parquet file"),
)


def read_text(path: Path) -> tuple[str, str | None]:
    """The text of a table, its line ends as '\\n', and the name of its encoding where that had to be guessed.

    A byte-order mark decides; without one the text is UTF-16 when every other byte is zero, UTF-8 when it is valid,
    else what charset-normalizer finds likeliest of OLD_ENCODINGS.

    Raises:
        BuilderError: there is no such file, it cannot be read, or it is no text (an Excel workbook named .csv).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BuilderError(f"there is no file {path}", "check the path") from None
    except (OSError, ValueError) as error:
        raise BuilderError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}", "check it") from None
    for start, kind in _NOT_TEXT:
        if data.startswith(start):
            raise BuilderError(f"{path} is not a CSV file: it is {kind}", "open it and save it as CSV in UTF-8")
    encoding, guessed = _encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise BuilderError(f"{path} cannot be read as {encoding}: {error.reason}", "save it as CSV in UTF-8") from None
    if "\0" in text:
        raise BuilderError(f"{path} is not a CSV file: it holds zero bytes", "save it as CSV in UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n"), encoding if guessed else None


def _encoding(data: bytes) -> tuple[str, bool]:
    """The encoding, and whether it is a guess among OLD_ENCODINGS."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding, False
    head = data[:512]
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) // 4:
        return ("utf-16-be" if even > odd else "utf-16-le"), False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        from charset_normalizer import from_bytes

        best = from_bytes(data, cp_isolation=list(OLD_ENCODINGS)).best()
        return (best.encoding if best is not None else OLD_ENCODINGS[0]), True
    return "utf-8", False
