"""What tells the frames of one series apart: parameters of the acquisition, and their place in time.

Sources: DICOM PS3.3 C.8.3.1 (MR image), C.8.13.5 (enhanced MR functional groups), C.7.6.16.2.2 (frame
content); for scanners that write b-values in private elements only, the conformance statements of Siemens, GE
and Philips.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from data_pipeline.readers.dicom_frames import FRAME_TYPES, Frame
from data_pipeline.readers.dicom_kinds import listed, words
from data_pipeline.readers.dicom_mosaic import csa_header, private

DIFFUSION, ECHO, TIMING = "MRDiffusionSequence", "MREchoSequence", "MRTimingAndRelatedParametersSequence"
CONTENT, CARDIAC = "FrameContentSequence", "CardiacSynchronizationSequence"
MODIFIER, X_RAY, KERNEL = "MRModifierSequence", "CTXRayDetailsSequence", "CTReconstructionSequence"
GE_OFFSET = 1e9  # added by GE to the b-value of several directions
#: b-values of one shell: neighbours in the sorted list no further apart than this share, or 1 s/mm².
SHELL = 0.02


def b_value(frame: Frame) -> float | None:
    """s/mm², from the standard element, else the private one of Siemens, GE or Philips; None if unknown."""
    value = number(frame.get("DiffusionBValue", DIFFUSION))
    if value is not None or frame.dataset.get("Modality") != "MR":
        return value
    if words(directionality(frame)) == ["NONE"]:
        return 0.0
    ds = frame.dataset
    for group, creator, offset in (
        (0x0019, "SIEMENS MR HEADER", 0x0C),
        (0x0043, "GEMS_PARM_01", 0x39),
        (0x2001, "Philips Imaging DD 001", 0x03),
    ):
        value = number(private(ds, group, creator, offset))
        if creator == "GEMS_PARM_01" and value is not None:
            value = (
                value % GE_OFFSET if "EP" in words(ds.get("ScanningSequence")) else None
            )  # else no b-value
        if value is not None:
            return value
    if (0x0029, 0x0010) in ds:
        items = csa_header(ds).get("B_value", {}).get("items", ())
        return number(items[0]) if items else None
    return None


def directionality(frame: Frame) -> Any:
    """DiffusionDirectionality: DIRECTIONAL, BMATRIX, ISOTROPIC or NONE; None where absent."""
    return frame.get("DiffusionDirectionality", DIFFUSION)


def direction(frame: Frame) -> tuple[float, ...] | None:
    """Unit vector of the diffusion gradient, rounded to 0.001, or None."""
    vector = frame.get("DiffusionGradientOrientation", DIFFUSION)
    if vector is None:
        for group in frame.groups:
            for item in group.get(DIFFUSION) or ():
                inner = item.get("DiffusionGradientDirectionSequence")
                if inner:
                    vector = inner[0].get("DiffusionGradientOrientation")
    if vector is None:
        vector = private(frame.dataset, 0x0019, "SIEMENS MR HEADER", 0x0E)
    if vector is None or isinstance(vector, bytes) or len(listed(vector)) != 3:
        return None
    return tuple(round(float(v), 3) + 0.0 for v in vector)


def shells(frames: Sequence[Frame]) -> dict[int, float | None]:
    """b-value of each frame (by `id`), the mean of its shell rounded to 1 s/mm²: scanners state 995 and 1005
    for one shell of 1000."""
    stated: dict[tuple[int, int | None], float | None] = {}  # tiles of a mosaic share their header
    found: dict[int, float | None] = {}
    for frame in frames:
        key = (id(frame.dataset), frame.number)
        if key not in stated:
            stated[key] = b_value(frame)
        found[id(frame)] = stated[key]
    shell_of: dict[float, float] = {}
    members: list[float] = []
    for value in [*sorted({v for v in found.values() if v is not None}), None]:
        if members and (value is None or value - members[-1] > max(1.0, SHELL * value)):
            shell_of.update(dict.fromkeys(members, float(round(sum(members) / len(members)))))
            members = []
        if value is not None:
            members.append(value)
    return {key: None if value is None else shell_of[value] for key, value in found.items()}


def _rounded(*values: Any) -> Hashable:
    """The first of ``values`` that is a number, to 0.01."""
    return next((round(n, 2) for value in values if (n := number(value)) is not None), None)


#: Parameters of an acquisition: frames that differ in one of them at one position are separate volumes.
PARAMETERS: dict[str, Callable[[Frame], Hashable]] = {
    "isotropic": lambda f: words(directionality(f)) == ["ISOTROPIC"],
    "type": lambda f: tuple(words(f.get("FrameType", *FRAME_TYPES) or f.get("ImageType"))),
    "echo": lambda f: _rounded(f.get("EchoNumbers")),
    "echo_time": lambda f: _rounded(f.get("EffectiveEchoTime", ECHO), f.get("EchoTime")),
    "inversion": lambda f: _rounded(f.get("InversionTimes", MODIFIER), f.get("InversionTime")),
    "flip": lambda f: _rounded(f.get("FlipAngle", TIMING)),
    "kernel": lambda f: tuple(words(f.get("ConvolutionKernel", KERNEL))),
    "kvp": lambda f: _rounded(f.get("KVP", X_RAY)),
}

#: Places in time (or among gradient directions): frames that differ in one of them are repeats of one volume.
TIMES: dict[str, Callable[[Frame], Hashable]] = {
    "temporal": lambda f: _rounded(
        f.get("TemporalPositionIndex", CONTENT), f.get("TemporalPositionIdentifier")
    ),
    "phase": lambda f: _rounded(f.get("NominalPercentageOfCardiacPhase", CARDIAC)),
    "trigger": lambda f: _rounded(f.get("NominalCardiacTriggerDelayTime", CARDIAC), f.get("TriggerTime")),
    "acquisition": lambda f: acquisition_number(f),
    "direction": direction,
    "time": lambda f: _time(f),
}


def acquisition_number(frame: Frame) -> Hashable:
    """AcquisitionNumber, or FrameAcquisitionNumber of an enhanced object; None where absent."""
    return _rounded(frame.get("FrameAcquisitionNumber", CONTENT), frame.get("AcquisitionNumber"))


def stack_id(frame: Frame) -> Hashable:
    """StackID of an enhanced object; None where absent."""
    return frame.get("StackID", CONTENT)


def instance_order(frame: Frame) -> tuple[float, ...]:
    """Sort key within a position where nothing else tells frames apart; equal only for frames that cannot be
    told apart."""
    return (number(frame.get("InstanceNumber")) or 0.0, frame.number or 0)


def _time(frame: Frame) -> Hashable:
    """When the frame was acquired, as text that sorts; only its order is used."""
    moment = frame.get("FrameAcquisitionDateTime", CONTENT) or frame.get("AcquisitionDateTime")
    if moment is not None:
        return str(moment)
    reference = number(frame.get("FrameReferenceTime"))
    if reference is not None and frame.dataset.get("Modality") == "PT":
        return f"{reference:020.3f}"
    time = frame.get("AcquisitionTime") or frame.get("ContentTime")
    return None if time is None else f"{frame.get('AcquisitionDate') or ''} {time}"


def number(value: Any) -> float | None:
    """A number, the first of several, or one written as bytes of unknown meaning; None where it is none."""
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace").strip(" \0").split("\\")[0]
    elif isinstance(value, str):
        value = value.split("\\")[0]
    else:
        value = listed(value)[0] if hasattr(value, "__iter__") and len(value) else value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < 1e15 else None
