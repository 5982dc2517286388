"""The MR sequence from what was played out: a closed list, decided by timing, not by names.

`sequence_of` is pure and knows no file format. It follows how the fields are defined in DICOM PS3.3 C.8.3.1
(ScanningSequence, SequenceVariant) and the usual ranges of TR, TE and TI at 1.5 and 3 T (Bernstein, King and
Zhou, Handbook of MRI Pulse Sequences, 2004; McRobbie et al., MRI from Picture to Proton, 3rd ed.).
"""

from __future__ import annotations

from collections.abc import Collection

#: The closed list. `other`: MR of a kind that is none of these; `unknown`: the header does not say enough.
#: `ADC` comes from a recipe or a file's name only: derived DICOM maps are refused.
SEQUENCES: tuple[str, ...] = (
    "T1w",
    "T1w-ce",
    "T2w",
    "T2star",
    "PDw",
    "FLAIR",
    "STIR",
    "DWI",
    "ADC",
    "BOLD",
    "PWI",
    "MRA",
    "SWI",
    "bSSFP",
    "other",
    "unknown",
)

SHORT_TI, LONG_TI = 350.0, 1400.0  # ms: fat is nulled at 120 to 300, fluid at 1650 to 3000
LONG_TR = 1500.0  # ms, spin echo: above it T1 has little weight
LONG_TE, SHORT_TE = 60.0, 35.0  # ms, spin echo: T2 weight from, proton density or T1 up to


def sequence_of(
    tr_ms: float | None,
    te_ms: float | None,
    ti_ms: float | None = None,
    scanning: Collection[str] = frozenset(),
    variant: Collection[str] = frozenset(),
    contrast: bool = False,
    b_value: float | None = None,
    *,
    flip_degrees: float | None = None,
    frames: int = 1,
    flavours: Collection[str] = frozenset(),
) -> str:
    """One of `SEQUENCES`.

    ``scanning`` holds codes of ScanningSequence (SE, IR, GR, EP, RM), ``variant`` of SequenceVariant (SK,
    MTC, SS, TRSS, SP, MP, OSP). ``contrast``: a contrast agent was given. ``b_value`` in s/mm², 0 included,
    is None where the series is not one of diffusion. ``frames``: repeats in time. ``flavours`` are words of
    ImageType or of flags that settle it: ANGIO, SWI, FMRI, PERFUSION.
    """
    scanning, variant, flavours = set(scanning), set(variant), set(flavours)
    if b_value is not None:
        return "DWI"
    for flavour, name in (("ANGIO", "MRA"), ("SWI", "SWI"), ("FMRI", "BOLD"), ("PERFUSION", "PWI")):
        if flavour in flavours:
            return name
    if te_ms is None or te_ms <= 0 or (tr_ms is None and ti_ms is None):
        return "unknown"
    tr, ti = tr_ms if tr_ms else None, ti_ms if ti_ms else None
    gradient, spin = "GR" in scanning, bool(scanning & {"SE", "IR"})
    if "EP" in scanning:
        return _echo_planar(te_ms, ti, gradient, "SE" in scanning, contrast, frames)
    if ti is None and "IR" in scanning and not gradient:
        return "unknown"  # an inversion without its time: FLAIR, STIR and T1 are all possible
    if gradient:
        return _gradient_echo(tr, te_ms, ti, variant, contrast, flip_degrees)
    return _spin_echo(tr, te_ms, ti, contrast) if spin else "unknown"


def _echo_planar(te: float, ti: float | None, gradient: bool, spin: bool, contrast: bool, frames: int) -> str:
    if ti is not None and ti >= LONG_TI and spin and not gradient:
        return "FLAIR"
    if gradient or not spin:
        if contrast and frames > 1:
            return "PWI"
        return "BOLD" if frames > 1 else "T2star"
    return "PWI" if contrast and frames > 1 else "T2w" if te >= SHORT_TE else "other"


def _gradient_echo(
    tr: float | None,
    te: float,
    ti: float | None,
    variant: set[str],
    contrast: bool,
    flip: float | None,
) -> str:
    prepared = ti is not None or "MP" in variant
    if prepared and te < 15:  # MPRAGE, IR-SPGR, TurboFLASH
        return "T1w-ce" if contrast else "T1w"
    if tr is None:
        return "unknown"
    if "SS" in variant and "SP" not in variant and "TRSS" not in variant and te >= 0.35 * tr and tr < 15:
        return "bSSFP"
    if te >= 15 and tr < 80 and "SP" in variant and (flip is None or flip <= 25):
        return "SWI"
    if te >= 9 and (flip is None or flip <= 40 or te >= 15):
        return "T2star"
    if flip is not None and flip <= 8 and tr >= 20:
        return "PDw"
    return "T1w-ce" if contrast else "T1w"


def _spin_echo(tr: float | None, te: float, ti: float | None, contrast: bool) -> str:
    if ti is not None:
        if ti <= SHORT_TI and (tr is None or tr >= 1000):
            return "STIR"
        if ti >= LONG_TI and (tr is None or tr >= 4000) and te >= SHORT_TE:
            return "FLAIR"
        if te < LONG_TE and ti < LONG_TI:
            return "T1w-ce" if contrast else "T1w"
        return "other"
    if tr is None:
        return "unknown"
    if tr < LONG_TR and te <= SHORT_TE:
        return "T1w-ce" if contrast else "T1w"
    if te >= LONG_TE:
        return "T2w"
    return "PDw" if te <= SHORT_TE + 10 and tr >= LONG_TR else "T2w" if tr >= LONG_TR else "other"
