"""The MR sequence of DICOM frames: fields of classic and enhanced headers for `sequences.sequence_of`."""

from __future__ import annotations

from data_pipeline.readers.dicom_acquisition import ECHO, MODIFIER, TIMING, number
from data_pipeline.readers.dicom_frames import FRAME_TYPES, Frame
from data_pipeline.readers.dicom_kinds import words
from data_pipeline.sequences import sequence_of

PULSE, CONTRAST = "MRPulseSequence", "ContrastBolusUsageSequence"
ANGIOGRAPHY = {"ANGIO", "TOF", "TIME OF FLIGHT", "PCA", "M PCA", "ANGIO TIME", "FLOW ENCODED"}
#: AcquisitionContrast of enhanced headers, where timing does not tell.
CONTRASTS = {
    "T1": "T1w",
    "T2": "T2w",
    "T2 STAR": "T2star",
    "PROTON DENSITY": "PDw",
    "FLUID ATTENUATED": "FLAIR",
    "STIR": "STIR",
    "DIFFUSION": "DWI",
    "PERFUSION": "PWI",
    "TOF": "MRA",
}
FASTEST_ECHO = 0.3  # ms between the echoes of a planar read-out, at least
PERFUSION = {"ASL", "PERFUSION", "DSC", "PWI"}


def sequence(frame: Frame, b_value: float | None, frames: int) -> str:
    """The sequence of an MR acquisition by its first frame; ``b_value`` is None where its series is not one
    of diffusion."""
    kind = set(words(frame.dataset.get("ImageType"))) | set(words(frame.get("FrameType", *FRAME_TYPES)))
    if b_value is None and kind & {"DIFFUSION", "TRACEW"}:
        b_value = 0.0
    flavours = set()
    if kind & ANGIOGRAPHY or "Y" in words(frame.get("AngioFlag")) or _yes(frame, "TimeOfFlightContrast"):
        flavours.add("ANGIO")
    flavours |= {"SWI"} if "SWI" in kind else set()
    flavours |= {"FMRI"} if kind & {"FMRI", "BOLD", "MOCO"} and frames > 1 else set()
    flavours |= {"PERFUSION"} if kind & PERFUSION else set()
    decided = sequence_of(
        number(frame.get("RepetitionTime", TIMING)),
        number(frame.get("EffectiveEchoTime", ECHO)) or number(frame.get("EchoTime")),
        number(frame.get("InversionTimes", MODIFIER)) or number(frame.get("InversionTime")),
        scanning(frame),
        variant(frame),
        contrast(frame),
        b_value,
        flip_degrees=number(frame.get("FlipAngle", TIMING)),
        frames=frames,
        flavours=flavours,
    )
    if decided != "unknown":
        return decided
    stated = words(frame.get("AcquisitionContrast", *FRAME_TYPES))
    return CONTRASTS.get(stated[0], decided) if stated else decided


def scanning(frame: Frame) -> set[str]:
    """Codes of ScanningSequence, or those that the fields of an enhanced header stand for."""
    codes = set(words(frame.get("ScanningSequence")))
    if codes:
        return codes
    echo = words(frame.get("EchoPulseSequence", PULSE))
    codes = {
        c
        for c, kinds in (("SE", ("SPIN", "BOTH")), ("GR", ("GRADIENT", "BOTH")))
        if echo and echo[0] in kinds
    }
    refocused, read_out = (number(frame.get(f"{n}EchoTrainLength", TIMING)) for n in ("RF", "Gradient"))
    if not codes and refocused is not None:
        codes.add("SE" if refocused else "GR")
    # Philips counts the shots of a gradient echo as a train too; a planar one cannot be that fast.
    slow = (number(frame.get("RepetitionTime", TIMING)) or 0.0) > FASTEST_ECHO * (read_out or 0.0)
    if _yes(frame, "EchoPlanarPulseSequence", PULSE) or ((read_out or 0.0) > 1 and slow):
        codes.add("EP")
    if _yes(frame, "InversionRecovery", MODIFIER):
        codes.add("IR")
    return codes


def variant(frame: Frame) -> set[str]:
    """Codes of SequenceVariant, or those that the fields of an enhanced header stand for."""
    codes = set(words(frame.get("SequenceVariant")))
    steady = words(frame.get("SteadyStatePulseSequence", PULSE))
    if steady and steady[0] not in ("NONE", ""):
        codes.add("SS")
    if words(frame.get("Spoiling", MODIFIER))[:1] in (["RF"], ["GRADIENT"], ["RF AND GRADIENT"]):
        codes.add("SP")
    return codes - {"NONE"}


def contrast(frame: Frame) -> bool:
    """Whether a contrast agent was given; what it was called is free text and is not kept."""
    used = words(frame.get("ContrastBolusAgentAdministered", CONTRAST))
    if used:
        return used[0] == "YES"
    agent = words(frame.get("ContrastBolusAgent"))
    return bool(frame.dataset.get("ContrastBolusAgentSequence")) or bool(
        agent and agent[0] not in ("", "NONE", "NO", "N", "NO CONTRAST", "WITHOUT")
    )


def _yes(frame: Frame, name: str, *sequences: str) -> bool:
    return words(frame.get(name, *sequences))[:1] == ["YES"]
