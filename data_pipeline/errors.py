"""The error a person can act on, and the refusal of one input with a code from a closed list."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipeline.locations import Location


class UserError(Exception):
    """One line that says what is wrong, where, and what to do; the command ends with exit code 2."""


def shown(place: object) -> str:
    """A path or address as one printable line for a person, whatever bytes its name is made of."""
    text = str(place).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


#: Every reason an input may be refused for, with the sentence a report shows for it.
REASONS = MappingProxyType(
    {
        "missing": "the file or folder is not there",
        "unreadable": "the file is not in the format its name says, or its header is damaged",
        "truncated": "the file ends before its voxels do",
        "unsupported_format": "no reader for this kind of file",
        "unsupported_layout": "an image whose axes have no reading here (vectors, complex, too many axes)",
        "no_pixel_data": "the file holds no voxels",
        "not_an_image": "a DICOM object that is not an image (RTSTRUCT, SEG, SR, dose, presentation state)",
        "unsupported_modality": "a modality other than CT, MR, PT and X-ray",
        "modality_mismatch": "the header states another modality than the one declared",
        "localizer": "a localizer (scout) image",
        "projection": "a projection or rendering (MIP, volume rendering, curved reformat), no grid of slices",
        "phase_image": "the phase, real or imaginary part of an MR signal, not its magnitude",
        "derived_map": "a derived map (ADC, FA, perfusion, subtraction, ...), not a signal",
        "several_acquisitions": "several acquisitions (b-values, echoes, phases) where one was asked for",
        "mosaic": "a Siemens mosaic without the private header that places its tiles",
        "unsupported_syntax": "voxels compressed in a way that no installed decoder reads",
        "secondary": "ImageType SECONDARY: made after the examination, not acquired",
        "secondary_capture": "a screen capture or secondary capture",
        "colour": "a colour image",
        "left_out": "an image of a kind that is not trained on (reference, phase, field map, map, mask)",
        "several_series": "more than one image series where one was asked for",
        "no_geometry": "the header does not say where the voxels lie in the patient",
        "bad_geometry": "spacing or directions that no scan can have (zero, not finite, not invertible)",
        "sheared": "axes that are not at right angles",
        "gantry_tilt": "slices shifted against each other (gantry tilt)",
        "mixed_orientation": "slices of one series in different orientations",
        "mixed_shape": "slices of one series with different sizes or pixel spacings",
        "missing_slices": "a gap: slices of the series are missing",
        "uneven_spacing": "slices at uneven distances",
        "duplicate_slices": "several slices at one position that do not form whole volumes",
        "no_spacing": "the pixel spacing is not stated, neither by the file nor by the source",
        "channel_grid": "channels of one case on different grids",
        "channel_count": "another number of channels than the dataset file names",
        "not_hounsfield": "a CT that cannot be in Hounsfield units",
        "constant": "every valid voxel has the same value",
        "value_range": "values that no scan has (beyond 1e15, or all within 1e-30 of each other)",
        "no_valid_voxels": "no finite voxel at all",
        "damaged_archive": "an archive (.tar) that is damaged or ends without its end mark",
        "unsafe_member": "a member of an archive that is no plain file, or whose name leads elsewhere",
        "duplicate_member": "two members of one name in an archive",
        "too_large": "larger than any image that can be stored",
        "sidecar_unreadable": "the JSON beside the image, which may name its subject, cannot be read",
        "unforeseen": "reading it failed in a way that nobody foresaw; the private index names the error",
        "kills_workers": "reading it ended its worker again and again, most likely for memory",
        "burned_in": "a radiograph that may have text burned in",
        "label_unreadable": "the label file cannot be read",
        "label_shape": "the label has another size and no geometry to place it with",
        "label_geometry": "the label has the size of the image and another position",
        "label_outside": "the label lies outside the image",
        "label_values": "the label holds values that no name was declared for",
        "label_no_image": "an RTSTRUCT or SEG whose images are not in the input",
        "label_empty": "an RTSTRUCT or SEG without any structure to use",
        "label_frame": "a label in another frame of reference than its images",
        "label_contours": "contours that do not lie in the slices of the image",
        "label_grey": "the label is grey or a probability map and no threshold was declared",
    }
)


class Quarantined(UserError):
    """One input is refused; the rest of a build goes on.

    ``code`` is a key of `REASONS`. ``detail`` states figures (never a path, name, date or UID), so that both
    may stand in a dataset. ``path`` and the text of the exception are for the person at the console only:
    what is written to a dataset, log or report uses ``code`` and ``detail``.
    """

    def __init__(self, code: str, detail: str = "", path: Location | None = None) -> None:
        if code not in REASONS:
            raise ValueError(f"{code!r} is not a reason code; add it to data_pipeline.errors.REASONS")
        self.code, self.detail, self.path = code, detail, path
        super().__init__(code, detail, path)

    def at(self, path: Location) -> Quarantined:
        """The same refusal, naming the file for the console (a file named further inside stays)."""
        return self if self.path is not None else type(self)(self.code, self.detail, path)

    def __str__(self) -> str:
        where = f"{shown(self.path)}: " if self.path is not None else ""
        return f"{where}{REASONS[self.code]}{f': {self.detail}' if self.detail else ''} [{self.code}]"
