"""What the name of a channel, file or folder says of an image: modality, MR sequence, or nothing.

A name may be written to a dataset only if every word of it is on the lists here; any other may identify.
"""

from __future__ import annotations

import re

# fmt: off
MODALITIES = {
    "CT": {"ct", "cta", "ctp", "cbct", "ldct", "ncct", "nect", "cect"},
    "MR": {"mr", "mri", "mra", "t1", "t2", "t1w", "t2w", "t1gd", "t1ce", "t1c", "t1n", "t1post", "t2f", "t2s",
           "t2star", "flair", "t2flair", "adc", "dwi", "dti", "pd", "pdw", "swi", "stir", "bold",
           "asl", "dce", "mprage", "mp2rage", "tse", "hbv", "fmri"},
    "PT": {"pt", "pet", "suv", "fdg", "psma"},
    "XR": {"xr", "cxr", "xray", "dx", "cr", "mg", "radiograph", "mammogram"},
}
#: MR sequences, the more telling first: "T2 FLAIR" is FLAIR.
SEQUENCES = {
    "other": {"adc"},
    "FLAIR": {"flair", "t2f", "t2flair"},
    "STIR": {"stir"},
    "T1w-ce": {"t1ce", "t1c", "t1gd", "t1post"},
    "DWI": {"dwi", "dti", "hbv"},
    "SWI": {"swi"},
    "MRA": {"mra"},
    "BOLD": {"bold", "fmri"},
    "T2star": {"t2s", "t2star"},
    "PDw": {"pd", "pdw"},
    "T1w": {"t1", "t1w", "t1n", "mprage"},
    "T2w": {"t2", "t2w"},
}
CONTRAST = {"ce", "gd", "post", "contrast", "gadolinium"}
#: Words of no modality that channel names are made of: phases, maps, normalisations.
OTHERS = {
    "arterial", "venous", "portal", "portalvenous", "delayed", "late", "early", "native", "plain", "pre",
    "nephrographic", "corticomedullary", "excretory", "equilibrium", "hepatobiliary", "phase", "nc",
    "noncontrast", "in", "out", "opp", "inphase", "outphase", "opposed", "fat", "water", "fs", "fatsat",
    "dixon", "ffe", "gre", "se", "epi", "ed", "es", "systole", "diastole", "rest", "stress", "axial",
    "sagittal", "coronal", "ax", "sag", "cor", "tra", "cbf", "cbv", "mtt", "tmax", "ttp", "ktrans", "fa",
    "md", "weighted", "image", "map", "channel", "low", "high", "res", "iso", "attenuation", "corrected",
    "ac", "nac", "ptct", "petct", "left", "right", "ap", "pa", "lateral", "frontal", "mlo", "cc", "x",
    "ray", "nonorm", "zscore", "norm", "rescale", "rgb", "to", "grey", "gray", "intensity", "unknown",
    "modality", "the", "and", "of", "b", "value",
}
# fmt: on
_B_VALUE = re.compile(r"b\d{1,4}")


def words_of(name: str) -> set[str]:
    """The lower-case words of a name."""
    return set(re.split(r"[^a-z0-9]+", name.lower().replace("x-ray", "xray"))) - {""}


def modality_of(name: str) -> str | None:
    """CT, MR, PT or XR where the name holds a word for it."""
    words = words_of(name)
    for modality, known in MODALITIES.items():
        if words & known:
            return modality
    return "MR" if any(_B_VALUE.fullmatch(word) for word in words) else None


def sequence_of(name: str) -> str | None:
    """The MR sequence that a name tells (one of `data_pipeline.sequences.SEQUENCES`), or None."""
    words = words_of(name)
    if any(_B_VALUE.fullmatch(word) for word in words):
        words.add("dwi")
    found = next((sequence for sequence, known in SEQUENCES.items() if words & known), None)
    return "T1w-ce" if found == "T1w" and words & CONTRAST else found


def channel_name(name: str, number: int) -> str:
    """The name itself if it consists of known words and at most one small number (three make a date), else
    ``channel_N``."""
    known = set().union(*MODALITIES.values(), CONTRAST, OTHERS)
    words = words_of(name)
    others = re.findall(r"[a-z0-9]+", name.lower().replace("x-ray", "xray"))
    others = [w for w in others if w not in known]
    fits = not others or (
        len(others) == 1 and (_B_VALUE.fullmatch(others[0]) or re.fullmatch(r"\d{1,2}", others[0]))
    )
    plain = re.fullmatch(r"[A-Za-z0-9 _.+*-]{1,40}", name) is not None
    return name if words and fits and plain else f"channel_{number}"
