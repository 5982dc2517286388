"""Names of labels that may be written: made of words for anatomy, lesions, sides and qualities alone.

A name of a structure is free text in DICOM (ROIName, SegmentLabel) and may hold a patient's or a physician's
name. One whose every word is in the vocabulary says nothing but anatomy, even where a word is also
somebody's surname (Foot, Chin); words that are commoner as names or initials than as anatomy count only in
company (`white` before `matter`). Any other name becomes a keyed hash until the recipe maps it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from data_pipeline.label_words import PHRASES, WORDS

if TYPE_CHECKING:
    from data_pipeline.sources import SourceConfig

LONGEST = 64
LARGEST_NUMBER = 99
_LONGEST_PHRASE = max(len(parts) for parts in PHRASES)
_SIDES = {"l", "r"}
_ALONE = {"ed"}  # oedema in BraTS; beside other words a given name
_TG263_FIRST = {"a", "v", "m", "n"}  # artery, vein, muscle, nerve: A_Carotid_L
_TARGETS = {"gtv", "ctv", "itv", "ptv"}
_TARGET_SUFFIXES = {"p", "n", "t", "m", "b", "ln", "nd", "tb", "tn", "sb"}
_NUMBERED = {
    "cn", "level", "levels", "nerve", "segment", "lobule", "ln", "neck", "type", "grade", "crus", "stage",
    "station", "zone", "layer", "seg", "hepatic", "liver",
}  # fmt: skip
_ROMAN = re.compile(r"(?:i{1,3}|iv|v|vi{1,3}|ix|x|xi{1,2})[ab]?")
_VERTEBRA = re.compile(r"[CTLS]0?(?:1[0-3]|[1-9])(?:[-/_ ]?[CTLS]0?(?:1[0-3]|[1-9]))*", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z0-9 _.,/+&()\[\]-]+")
_PIECE = re.compile(r"[CTLS](?:1[0-3]|[1-9])(?!\d)|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def allowed_name(name: str) -> str | None:
    """The name with its white space tidied, if it is made of words of the vocabulary and at most one small
    number.

    Case and separators stay as they are; None for any other name.
    """
    tidy = " ".join(name.split())
    if tidy.lower() in _ALONE:
        return tidy
    if not tidy or len(tidy) > LONGEST or _PLAIN.fullmatch(tidy) is None:
        return None
    words = _words(tidy)
    return tidy if words and _known(words) else None


def public_name(name: str, source: SourceConfig, hashes_of: Callable[[str], str]) -> str:
    """The name to write for one found in a file: as the recipe maps it, else itself where it is allowed,
    else ``roi_`` and 12 hex digits of its keyed hash (``hashes_of``). Names differing in case or spaces hash
    alike.
    """
    mapped = stated_name(name, source)
    if mapped is not None:
        return mapped
    return allowed_name(name) or f"roi_{hashes_of(' '.join(name.split()).casefold())[:12]}"


def stated_name(name: str, source: SourceConfig) -> str | None:
    """What ``label_names`` of the recipe makes of a name: as written, else whatever its case and spaces."""
    stated = source.label_names or {}
    if name in stated:
        return stated[name]
    folded = " ".join(name.split()).casefold()
    return next((to for found, to in stated.items() if " ".join(found.split()).casefold() == folded), None)


def _words(tidy: str) -> list[str]:
    """Lower-case words and numbers; vertebrae (L1, C2-T3) are one word of their own."""
    words = []
    for chunk in re.split(r"[^A-Za-z0-9]+", tidy):
        if not chunk:
            continue
        if _VERTEBRA.fullmatch(chunk):
            words.append("vertebra")
        elif chunk.lower() in WORDS:
            words.append(chunk.lower())
        else:
            words.extend("vertebra" if _VERTEBRA.fullmatch(p) else p.lower() for p in _PIECE.findall(chunk))
    return words


def _known(words: list[str]) -> bool:
    numbers = sides = 0
    at = 0
    while at < len(words):
        word = words[at]
        before = words[at - 1] if at else ""
        if length := _phrase(words, at):
            at += length
            continue
        if word.isdigit():
            numbers += 1
            if len(word) > 2 or int(word) > LARGEST_NUMBER or numbers > 1:
                return False
        elif word in _SIDES:
            sides += 1
            if sides > 1 or len(words) == 1:
                return False
        elif not (
            word in WORDS
            or (word in _TG263_FIRST and at == 0 and len(words) > 1)
            or (word in _TARGET_SUFFIXES and any(before.startswith(t) for t in _TARGETS))
            or (_ROMAN.fullmatch(word) and before in _NUMBERED)
            or (word in ("a", "b", "p", "n", "t") and before.isdigit() and numbers == 1)
        ):
            return False
        at += 1
    return any(not word.isdigit() and word not in _SIDES for word in words)


def _phrase(words: list[str], at: int) -> int:
    """How many words from ``at`` make one of the phrases; 0 where none does."""
    for length in range(_LONGEST_PHRASE, 1, -1):
        if tuple(words[at : at + length]) in PHRASES:
            return length
    return 0
