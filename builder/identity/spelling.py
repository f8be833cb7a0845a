"""One spelling for a patient's id, however a spreadsheet, a file name or a keyboard changed it.

The rule, in order:

1. Unicode NFKC, so that full-width letters, ligatures and other digits become plain ones; invisible characters
   (zero-width, soft hyphen, marks of direction) go; case is folded; accents of Latin, Greek and Cyrillic letters go.
2. A comma between groups of three digits goes (`1,000`), and so do decimals that are all zero (`7.0`, `7,0`).
3. What is left are runs of letters and runs of digits; all between them (spaces, dashes, dots, underscores, quotes)
   only parts them. Runs of digits lose their leading zeros.
4. Words that only say "patient" or "number" (`P`, `Pat.`, `Patient`, `Subject`, `ID`, `No`) go where anything remains.
5. Of an id without digits (a name) the order of the words does not count, and in words of five letters or more `ae`,
   `oe` and `ue` are `a`, `o` and `u`, which umlauts become by rule 1.

So `007`, `7`, `7.0`, `P-007`, `patient 7` and `sub_07` are one patient; `7-1` and `71` are two, and so are `A7` and
`B7`. The rule rather takes two patients for one (they then share a split) than one for two (who would leak).
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

NUMBER_WORDS = frozenset(
    word + end
    for word in ("p", "pt", "pat", "patient", "patientin", "sub", "subj", "subject", "participant", "case", "proband")
    for end in ("", "s", "id", "no", "nr", "number")
) | frozenset(("id", "no", "nr", "num", "number"))
MISSING = frozenset(("nan", "null", "none", "n-a", "a-n", "unknown", "nat"))  # what programs write into an empty cell
_LONG_CODE = 16  # hex digits; a code so long is a UUID or a hash, and its leading zeros count
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_NO_DECIMALS = re.compile(r"(?<![\d.,])(\d+)(?:\.0+|,00?)(?![\d.,])")
_LONG_WORD = 5  # letters; shorter ones may be codes
_UMLAUT = re.compile("([aou])e+")
_PLAIN_LETTERS = str.maketrans({"ı": "i", "ø": "o", "œ": "oe", "æ": "ae", "ł": "l", "đ": "d", "ð": "d"})
_RUNS = re.compile(r"\d+|[^\W\d_]+")


@lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """The one spelling of a patient's id.

    Args:
        text: the id as somebody wrote it.

    Returns:
        Runs of letters and digits joined by '-', such as 'dfu-7'. Empty where the text names nobody: no letter and no
        digit in it, or a word for an empty cell (nan, null, none, N/A, unknown).
    """
    plain = _plain(text)
    code = re.sub(r"[\W_]", "", plain)
    if _is_long_code(code):
        return code
    plain = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), plain)
    plain = _NO_DECIMALS.sub(r"\1", plain)
    runs = [run.lstrip("0") or "0" if run.isdecimal() else run for run in _RUNS.findall(plain)]
    runs = [run for run in runs if run not in NUMBER_WORDS] or runs
    if not any(run.isdecimal() for run in runs):
        runs = sorted(_UMLAUT.sub(r"\1", run) if len(run) >= _LONG_WORD else run for run in runs)
    spelling = "-".join(runs)
    return "" if spelling in MISSING else spelling


def form_of(spelling: str) -> str:
    """How an id is built, without its number: 'dfu-7' is of the form 'dfu-0', '7' of '0'.

    Of ids without digits a short code is of 'letters', and a longer word or several words are a 'name'. Ids of
    different forms may be one patient written in two ways (`DFU-7` here, `7` there), which no comparison of hashes
    would find. Letters that a number follows are a prefix and count literally.
    """
    runs = spelling.split("-")
    letters = [run for run in runs if not run.isdecimal()]
    if _is_long_code(spelling):
        return f"code of {len(spelling)}"
    if len(letters) == len(runs):
        return "name" if len(runs) > 1 or len(spelling) >= _LONG_WORD else "letters"
    if len(letters) <= 2 and all(run.isdecimal() for run in runs[len(letters) :]):
        return "-".join("0" if run.isdecimal() else run for run in runs)
    return "letters and digits"


def _is_long_code(text: str) -> bool:
    mixed = not text.isdecimal() and not text.isalpha()
    return mixed and len(text) >= _LONG_CODE and re.fullmatch("[0-9a-f]+", text) is not None


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = []
    for letter in unicodedata.normalize("NFKD", folded):
        kind = unicodedata.category(letter)
        if kind == "Cf" or "\u0300" <= letter <= "\u036f":
            continue
        digit = unicodedata.digit(letter, None) if kind[0] == "N" else None
        kept.append(letter if digit is None else str(digit))
    return unicodedata.normalize("NFC", "".join(kept).translate(_PLAIN_LETTERS))
