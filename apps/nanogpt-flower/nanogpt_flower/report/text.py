"""Format numbers and untrusted text for a page."""

import re
import unicodedata
from pathlib import PureWindowsPath

LABEL_LENGTH = 60  # characters of a label that a page shows
SENTENCE_LENGTH = 300  # characters of a reason or of another sentence

_JOINERS = "\u200c\u200d"  # Persian words and joined emoji need these two format characters
_SCHEME = re.compile(r"\b[A-Za-z][\w+.-]*://(?:[^\s/]*@)?")  # of an address, with its credentials
# An absolute path: in quotes with spaces, or without spaces and with at least two separators.
_QUOTED_PATH = re.compile(r"(?<=['\"])(?:[A-Za-z]:|~)?[\\/][^'\"]*(?=['\"])")
_PATH = re.compile(r"(?<![\w.:\\/])(?:[A-Za-z]:|~)?(?:[\\/][^\s\\/'\":,;()]+){2,}[\\/]?")


def clean(text: str, limit: int, *, lines: bool = False) -> str:
    """Make an untrusted text fit to be shown. The result is not escaped for HTML.

    A control character becomes its visible picture, such as `␛`, and any other invisible character
    becomes `�`. Line breaks and tabs stay if `lines` is true. A text of more than `limit`
    characters is cut and ends with an ellipsis.
    """
    if len(text) > limit:
        text = text[: limit - 1].rstrip() + "…"
    if lines:
        text = text.replace("\r\n", "\n")
    return "".join(c if lines and c in "\n\t" else _visible(c) for c in text)


def _visible(character: str) -> str:
    if character < " ":
        return chr(0x2400 + ord(character))
    if character == "\x7f":
        return "␡"
    # Cf includes the marks that reverse the direction of text. Cs cannot be encoded as UTF-8.
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "\ufffd" if hidden and character not in _JOINERS else character


def last_component(path: str) -> str:
    """Return the last component of a path. A report must not show directories of its machine."""
    return PureWindowsPath(path).name or path


def sentence(text: str) -> str:
    """Clean a sentence, and shorten each absolute path in it to its last component."""
    text = _SCHEME.sub("", text[: 4 * SENTENCE_LENGTH])
    for pattern in (_QUOTED_PATH, _PATH):
        text = pattern.sub(lambda match: last_component(match[0]), text)
    return clean(text, SENTENCE_LENGTH)


def count(number: float) -> str:
    """Format a large number in three digits, such as `1.23M`. Small whole numbers are exact."""
    if number < 10_000:
        return f"{number:,.0f}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if number < 999.5 * size:
            return f"{_three_digits(number / size)}{unit}"
    return f"{_three_digits(number / 1e12)}T"


def short_count(number: float) -> str:
    """Format a round number for the tick of an axis, such as `0.5M`."""
    if number >= 1e6:
        return f"{number / 1e6:g}M"
    return f"{number / 1e3:g}k" if number >= 1e3 else f"{number:g}"


def megabytes(number: float) -> str:
    """Format a number of bytes in megabytes (10^6 bytes)."""
    return f"{_three_digits(number / 1e6)} MB"


def duration(seconds: float) -> str:
    """Format a time, such as `9.5 s`, `4 min 20 s` or `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def ranges(numbers: list[int]) -> str:
    """Format ascending numbers, such as `1–3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("–".join(map(str, run)) for run in runs)
