"""WebDatasets of others: tar archives in which the members of a sample share a key.

``KEY.nii.gz`` or any other single file that is read here, ``KEY.json``, and a label ``KEY.seg.nii.gz``; the
key is the name up to its first dot, with its folders (webdataset/webdataset, "WebDataset File Format
Specification"). Archives are listed here and never unpacked: a member is fetched when its case is read.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, cast

from data_pipeline.channel_words import modality_of, sequence_of, words_of
from data_pipeline.errors import Quarantined, UserError, shown
from data_pipeline.layout_folder import BESIDE
from data_pipeline.layouts import Case, Discovery
from data_pipeline.locations import Location, files_below, is_remote, relative, store_errors
from data_pipeline.quiet import quiet_libraries
from data_pipeline.readers import DICOM, ITK, NIFTI, NUMPY, PICTURES
from data_pipeline.sources import SourceConfig
from data_pipeline.tar_members import Listing, TarMember, is_archive, members
from data_pipeline.volume import Triple

KEY = re.compile(r"((?:.*/|)[^./]+)\.([^/]+)")
DICOM_START = 1 << 20  # bytes in which a patient is named
DETACHED = (".hdr", ".img", ".nhdr", ".mhd")  # a header whose voxels are in another file
SINGLE = tuple(s for s in (*NIFTI, *ITK, *PICTURES, *NUMPY, *DICOM) if s not in DETACHED)
IMAGE_WORDS = {"image", "images", "img", "input", "scan", "volume", "vol", "data"}
LABEL_WORDS = {"seg", "label", "labels", "mask", "masks", "segmentation", "gt", "gts"}
SUBJECT = (
    "subject", "subjectid", "patient", "patientid", "participant", "participantid",
)  # fmt: skip
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
FOLDERS = {"imagesTr", "labelsTr", "imagesTs", "dataset.json", "dataset_description.json"}


@dataclass
class _Sample:
    """The members of one key: images and labels by what their name says between key and suffix."""

    key: str
    images: dict[str, TarMember] = field(default_factory=dict)
    labels: dict[str, TarMember] = field(default_factory=dict)
    about: TarMember | None = None
    fault: tuple[str, TarMember] | None = None


@dataclass(frozen=True)
class _About:
    """What is taken from a sample's JSON."""

    subject: str = ""
    split: str | None = None
    modality: str = ""
    spacing: tuple[float, ...] = ()


def webdataset(find: Discovery) -> list[Case]:
    """Every image member of every archive below the folder (or of the one archive), by archive and place.

    Of KEY.json only subject, split, modality and spacing are used; other fields are counted. Samples that
    cannot be trusted, and archives that end too early, are refused cases.
    """
    src = find.src
    unlisted: list[None] = []
    if src.label_glob is not None:
        raise UserError(
            f"source {src.name!r}: labels of a WebDataset are its KEY.seg.nii.gz; leave out label_glob"
        )
    found = files_below(src.path, lambda: unlisted.append(None))
    shards = [path for path in found if is_archive(path)]
    find.count("folders that cannot be listed", len(unlisted))
    for path in found:
        if not is_archive(path):
            _count_other(find, path.name)
    arguments = [(shard,) for shard in shards]
    listed = find.each(list_shard, arguments) if find.each else [list_shard(shard) for shard in shards]
    cases: list[Case] = []
    unused: set[str] = set()
    for shard, (listing, patients) in zip(shards, listed):
        cases += _Shard(find, shard, listing, patients, unused).cases()
    find.count("kinds of fields in KEY.json not used", len(unused))
    return cases


@quiet_libraries()
def list_shard(shard: Location) -> tuple[Listing, dict[str, str]]:
    """The members of an archive with its JSON, and the PatientID of each DICOM member. An archive that cannot
    be opened is an empty listing with damage."""
    try:
        with store_errors(shard) if is_remote(shard) else nullcontext():
            listing = members(shard, lambda name: name.endswith(".json"))
            return listing, {m.member: _patient(m) for m in listing.members if _is_dicom(m)}
    except FileNotFoundError:
        return Listing([], {}, Quarantined("missing", "", shard)), {}
    except OSError as error:
        return Listing([], {}, Quarantined("unreadable", type(error).__name__, shard)), {}


def _is_dicom(member: TarMember) -> bool:
    return member.name.lower().endswith(DICOM)


def _patient(member: TarMember) -> str:
    from pydicom import dcmread

    if member.fault is not None:
        return ""
    try:
        with member.open() as file:
            start = io.BytesIO(file.read(DICOM_START))
        header = dcmread(start, stop_before_pixels=True, specific_tags=["PatientID"])
        return str(header.get("PatientID", "") or "").strip()
    except Exception:  # the case is refused when it is read, with its reason
        return ""


class _Shard:
    """One archive: its samples, and what becomes of each."""

    def __init__(
        self,
        find: Discovery,
        shard: Location,
        listing: Listing,
        patients: Mapping[str, str],
        unused: set[str],
    ) -> None:
        self.find, self.src, self.shard, self.listing = find, find.src, shard, listing
        self.patients, self.unused = patients, unused
        self.samples: dict[str, _Sample] = {}
        last = None
        for member in listing.members:
            last = self._sort(member) or last
        if listing.damage is not None and last is not None and last.fault is None:
            last.fault = ("truncated", next(m for m in listing.members if _key(m.member) == last.key))

    def cases(self) -> list[Case]:
        """Cases in the order of the archive; at its end, where it is damaged, the archive itself, refused."""
        cases = [case for sample in self.samples.values() for case in self._of(sample)]
        if (damage := self.listing.damage) is not None:
            cases.append(self._refused(damage, self.shard, self.shard.name))
        return cases

    def _sort(self, member: TarMember) -> _Sample | None:
        """Put a member into its sample; None for what belongs to none."""
        self._check_foreign(member)
        hidden = member.name.startswith((".", "__"))
        found = None if hidden else KEY.fullmatch(member.member)
        if found is None:
            if member.fault is not None and not hidden:
                return self._faulty(member.member, member)
            _count_other(self.find, member.name)
            return None
        key, name = found[1], found[2].lower()
        if member.fault is not None:
            return self._faulty(key, member)
        if name == "json":
            sample = self.samples.setdefault(key, _Sample(key))
            sample.about = member
            return sample
        suffix = next((s for s in sorted(SINGLE, key=len, reverse=True) if f".{name}".endswith(s)), None)
        if suffix is None:
            _count_other(self.find, member.name)
            return None
        sample = self.samples.setdefault(key, _Sample(key))
        what = f".{name}"[: -len(suffix)].strip(".")
        head, _, word = what.replace("_", ".").replace("-", ".").rpartition(".")
        if word in LABEL_WORDS:
            kind, what = sample.labels, head
        else:
            kind = sample.images
        if what in kind:  # KEY.nii and KEY.nii.gz, or two labels
            sample.fault = ("duplicate_member", member)
        kind[what] = member
        return sample

    def _faulty(self, key: str, member: TarMember) -> _Sample:
        sample = self.samples.setdefault(key, _Sample(key))
        sample.fault = (str(member.fault), member)
        return sample

    def _check_foreign(self, member: TarMember) -> None:
        if member.name.endswith(".b2nd"):
            raise UserError(f"{shown(self.shard)}: is a shard that medfm built; train on its folder as it is")
        if FOLDERS & set(member.member.split("/")):
            raise UserError(
                f"{shown(self.shard)}: is an archive of a dataset folder, no WebDataset; unpack it and give "
                "the folder"
            )

    def _of(self, sample: _Sample) -> list[Case]:
        if sample.fault is not None:
            code, member = sample.fault
            return [self._refused(Quarantined(code, "", _place(member)), _place(member), sample.key)]
        images = {what: m for what, m in sample.images.items() if self._wanted(what, m)}
        if not images:
            return []
        first = _place(next(iter(images.values())))
        if self._is_label(sample.key):
            return [self._refused(Quarantined("left_out", "its key says label", first), first, sample.key)]
        try:
            about = self._about(sample)
        except Quarantined as error:
            return [self._refused(error.at(first), first, sample.key)]
        unfit = sample.labels.keys() - images.keys() - {""}
        self.find.count("labels in archives whose name fits no image", len(unfit))
        return [self._case(sample, what, member, about) for what, member in images.items()]

    def _wanted(self, what: str, member: TarMember) -> bool:
        """Whether a member is an image: its name says so, or `include` does (masks have many names)."""
        rel = relative(_place(member), self.src.path)
        if not self.src.selects(rel):
            return False
        if not what or self.src.include or modality_of(what) or words_of(what) & IMAGE_WORDS:
            return True
        self.find.count("members of archives whose name says neither image nor label (name them in include)")
        return False

    def _is_label(self, key: str) -> bool:
        """Whether a sample is the label of another by its key: KEY_seg beside KEY."""
        found = re.fullmatch(r"(.+)[_-]([^_-]+)", key)
        return found is not None and found[2].lower() in LABEL_WORDS and found[1] in self.samples

    def _about(self, sample: _Sample) -> _About:
        if sample.about is None:
            return _About()
        try:
            read = json.loads(self.listing.texts[sample.about.member].decode("utf-8-sig"))
        except KeyError:
            raise Quarantined("sidecar_unreadable", f"{sample.about.size} bytes") from None
        except (ValueError, RecursionError) as error:
            raise Quarantined("sidecar_unreadable", type(error).__name__) from None
        if not isinstance(read, dict):
            raise Quarantined("sidecar_unreadable", "no JSON object")
        fields = {re.sub(r"[^a-z]", "", str(name).lower()): value for name, value in read.items()}
        subject = next((text for name in SUBJECT if (text := _text(fields.get(name)))), "")
        known = {*SUBJECT, "split", "modality", "spacing"}
        self.unused.update(fields.keys() - known)
        split = _text(fields.get("split")).lower()
        if split and split not in SPLITS:
            self.find.count("splits in KEY.json that are not train, val or test")
        modality = _text(fields.get("modality"))
        if modality and modality_of(modality) is None:
            raise Quarantined("unsupported_modality", "by its JSON")
        return _About(subject, SPLITS.get(split), modality, _numbers(fields.get("spacing")))

    def _case(self, sample: _Sample, what: str, member: TarMember, about: _About) -> Case:
        place = _place(member)
        rel = relative(place, self.src.path)
        stated = modality_of(what) or modality_of(about.modality)
        modality = self.src.modality_of(rel) or stated
        if modality is None and not _is_dicom(member):
            raise UserError(
                f"{shown(place)}: neither its JSON nor source {self.src.name!r} says what kind of image this "
                "is; state modality: CT, MR, XR or PT, or modality: {glob: CT, ...} where they differ"
            )
        label = sample.labels.get(what) or sample.labels.get("")
        split = self.src.split_of(rel) or about.split or _split_of(relative(self.shard, self.src.path))
        spacing = _spacing(about.spacing, member, self.src)
        self.find.count("spacings taken from KEY.json", spacing is not None)
        return Case(
            self.src.name,
            (place,),
            None if label is None else _place(label),
            about.subject
            or self.patients.get(member.member)
            or (f"{split}/{sample.key}" if split else sample.key),
            split,
            (modality,) if modality else (),
            name=PurePosixPath(sample.key).name,
            sequence=(sequence_of(what) or sequence_of(about.modality) or "") if modality == "MR" else "",
            spacing=spacing,
        )

    def _refused(self, why: Quarantined, place: Location, key: str) -> Case:
        return Case(self.src.name, (place,), None, key, None, (), name=key, refused=why)


def _place(member: TarMember) -> Location:
    """A member where a file is asked for: it does all that is asked of a file there."""
    return cast("Location", member)


def _key(name: str) -> str:
    found = KEY.fullmatch(name)
    return found[1] if found else name


def _split_of(shard: str) -> str | None:
    """What the archive's name says; train is divided like any other source, as in MSD and nnU-Net."""
    said = {SPLITS[word] for word in re.split(r"[^a-z]+", shard.lower()) if word in SPLITS}
    return said.pop() if len(said) == 1 and "train" not in said else None


def _text(value: Any) -> str:
    return str(value).strip() if isinstance(value, str) or type(value) is int else ""


def _numbers(value: Any) -> tuple[float, ...]:
    """Two or three lengths in mm, or none."""
    fits = isinstance(value, Sequence) and not isinstance(value, str) and len(value) in (2, 3)
    if not fits or not all(type(v) in (int, float) and 1e-3 < v < 1e3 for v in value):
        return ()
    return tuple(float(v) for v in value)


def _spacing(stated: tuple[float, ...], member: TarMember, src: SourceConfig) -> Triple | None:
    """(z, y, x) mm for the formats that state none: (y, x) or (z, y, x), as the axes of the array run."""
    if not stated or src.spacing is not None or not member.name.lower().endswith((*PICTURES, *NUMPY)):
        return None
    z, y, x = stated if len(stated) == 3 else (stated[0], *stated)
    return z, y, x


def _count_other(find: Discovery, name: str) -> None:
    suffix = PurePosixPath(name).suffix.lower()
    find.count(f"files that are no image: {suffix if suffix in BESIDE else 'other'}")
