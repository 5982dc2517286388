"""The allow-list against DICOM PS3.15 Annex E and against every element of the data dictionary.

`ps3_15_table_e1_1.csv` is table E.1-1 of PS3.15 (2024b): tag, keyword and basic action of its 617 single
attributes. Rows of whole groups (private elements, curves, overlays) are in `test_privacy_planted_dicom.py`.
"""

from __future__ import annotations

import ast
import csv
import re
import warnings
from pathlib import Path
from typing import Any

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import DataElement, Dataset, Sequence
from pydicom.datadict import DicomDictionary, dictionary_VR, keyword_dict, tag_for_keyword

import data_pipeline
from data_pipeline.channel_words import channel_name
from data_pipeline.label_names import allowed_name, public_name
from data_pipeline.privacy import BODY_PARTS, CODES, NOTES, NUMBERS, VENDORS, allowed, technical_fields
from data_pipeline.sources import SourceConfig

#: Attributes of the profile that are kept all the same, and the option of PS3.15 E.3 that covers each.
KEPT_BY_OPTION = {"PatientAge": "Retain Patient Characteristics"}
OF_A_HEADER = {*NUMBERS, *CODES, "Manufacturer", "PatientAge"}


def profile() -> dict[str, str]:
    """Keyword -> basic action of table E.1-1."""
    lines = (Path(__file__).parent / "ps3_15_table_e1_1.csv").read_text().splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {row["keyword"]: row["action"] for row in rows}


def is_closed(name: str, value: str) -> bool:
    """Whether a kept value is one of finitely many that cannot name a person."""
    if name in NUMBERS:
        low, high = NUMBERS[name]
        digits = value.replace(".", "").lstrip("0")
        return low <= float(value) <= high and len(digits) <= 5
    if name in CODES:
        return value in CODES[name]
    if name == "Manufacturer":
        return value in (*VENDORS, "other")
    if name == "PatientAge":
        return value == "89+" or 0 <= int(value) <= 89
    return name in NOTES and re.fullmatch(NOTES[name], value) is not None


def test_every_attribute_of_the_profile_is_dropped_or_kept_under_an_option() -> None:
    table = profile()
    assert len(table) == 617
    assert {table[k] for k in ("PatientName", "PatientSex", "PatientAge", "SOPInstanceUID")} == {
        "Z",
        "X",
        "U",
    }
    assert OF_A_HEADER & table.keys() == KEPT_BY_OPTION.keys()
    assert "PatientSex" not in OF_A_HEADER


def test_kept_names_are_attributes_of_the_standard() -> None:
    for name in OF_A_HEADER:
        assert tag_for_keyword(name) is not None, name


def element(keyword: str, value: Any) -> Dataset:
    """A header that holds one element, whatever pydicom thinks of its value."""
    header = Dataset()
    tag = tag_for_keyword(keyword)
    assert tag is not None
    vr = dictionary_VR(tag).split(" or ")[0]
    try:
        with warnings.catch_warnings(action="ignore"):
            header[tag] = DataElement(tag, vr, value, validation_mode=pydicom.config.IGNORE)
    except Exception:  # no value of this VR
        return Dataset()
    return header


def plausible(vr: str) -> list[Any]:
    """Values that would pass as technical ones, were their element on the list."""
    inner = Dataset()
    inner.PatientName, inner.KVP, inner.PatientAge = "SIEMENS", "120", "045Y"
    if vr == "SQ":
        return [Sequence([inner])]
    if vr in ("OB", "OW", "UN", "OD", "OF", "OL", "OV"):
        return [b"045Y", b"120 "]
    if vr in ("US", "SS", "UL", "SL", "FL", "FD", "UV", "SV", "AT"):
        return [45, 120, 1]
    return ["120", "045Y", "SIEMENS", "BRAIN", "SE", "NO", "true", "F", "3"]


@pytest.mark.parametrize("part", range(4))
def test_no_other_element_of_the_dictionary_comes_through(part: int) -> None:
    """Each keyword of pydicom's dictionary alone, with values that listed fields would accept."""
    walked = 0
    for keyword in sorted(keyword_dict)[part::4]:
        if keyword in OF_A_HEADER:
            continue
        vr = dictionary_VR(keyword_dict[keyword]).split(" or ")[0]
        for value in plausible(vr)[:: 1 if vr != "UI" else 3]:
            assert technical_fields(element(keyword, value)) == {}, (keyword, value)
        walked += 1
    assert walked > 1100


def test_the_whole_dictionary_at_once() -> None:
    """All elements in one header: what comes out is the list and nothing else."""
    header = Dataset()
    for tag, (vr, *_, keyword) in DicomDictionary.items():
        if keyword and (found := element(keyword, plausible(vr.split(" or ")[0])[0])):
            header[tag] = found[tag]
    assert len(header) > 4500
    fields = technical_fields(header)
    assert fields.keys() <= OF_A_HEADER
    assert fields["KVP"] == "120"


IDENTIFYING = st.one_of(
    st.text(max_size=40),
    st.text("0123456789", max_size=16),
    st.dates().map(lambda d: d.strftime("%Y%m%d")),
    st.dates().map(lambda d: d.strftime("%d.%m.%Y")),
    st.from_regex(r"[A-Z][a-z]{2,9}(\^[A-Z][a-z]{2,9}){0,2}", fullmatch=True),
    st.from_regex(r"[0-9]{0,9}[.][0-9]{1,9}", fullmatch=True),
    st.floats().map(str),
    st.integers().map(str),
    st.sampled_from(
        [*VENDORS, *BODY_PARTS, "SE", "NO", "045Y", "120Y", "89+", "2 of 3", "true", "per slice"]
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.one_of(st.sampled_from([*OF_A_HEADER, *NOTES]), st.text()), IDENTIFYING))
def test_allowed_keeps_closed_values_only(found: dict[str, str]) -> None:
    for name, value in allowed(found).items():
        assert is_closed(name, value), (name, value)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(OF_A_HEADER)), IDENTIFYING))
def test_headers_give_closed_values_only(found: dict[str, str]) -> None:
    header = Dataset()
    for name, value in found.items():
        if one := element(name, value):
            header[tag_for_keyword(name)] = one[tag_for_keyword(name)]
    for name, value in technical_fields(header).items():
        assert is_closed(name, value), (name, value)


@given(st.sampled_from([*OF_A_HEADER, *NOTES]), st.text())
def test_a_name_around_a_good_value_drops_it(name: str, text: str) -> None:
    for value in (f"Doe {text}", f"{text} Doe", f"120 Doe{text}", f"SIEMENS\nDoe{text}", f"true\nDoe{text}"):
        assert allowed({name: value}) == {}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_cannot_carry_dates_or_ids(name: str) -> None:
    """No date in any usual order, no identity number of six digits or more, no digits after the fifth."""
    for smuggled in ("19471231", "31121947", "471231", "7741903", "1.9471231e7", "nan", "inf", "-1", "1_2x"):
        assert allowed({name: smuggled}) == {}, smuggled
    low, high = NUMBERS[name]
    middle = f"{(low + high) / 3:.3g}"
    assert allowed({name: middle}) == {name: f"{float(middle):g}"}
    for text in ("12.19471231", "3.1121947", "1.23456789", "77.41903", "19.4712", "4999.99999"):
        for value in allowed({name: text}).values():
            assert len(value.replace(".", "").lstrip("0")) <= 5


def test_what_passes() -> None:
    found = {
        "KVP": "120",
        "EchoTime": "3.40",
        "RepetitionTime": "2300.1234",
        "frame": "2 of 10",
        "PatientAge": "89+",
        "Manufacturer": "siemens",
        "BodyPartExamined": "BRAIN",
        "PatientSex": "F",
        "KVPP": "1",
    }
    kept = {k: v for k, v in found.items() if k not in ("PatientSex", "KVPP")}
    assert allowed(found) == kept | {"EchoTime": "3.4", "RepetitionTime": "2300.1"}


@pytest.mark.parametrize(("years", "kept"), [("089Y", "89"), ("090Y", "89+"), ("104Y", "89+"), ("007Y", "7")])
def test_ages_above_89_are_one_age(years: str, kept: str) -> None:
    header = Dataset()
    header.PatientAge = years
    assert technical_fields(header) == {"PatientAge": kept}
    assert allowed({"PatientAge": str(int(years[:3]))}) == ({"PatientAge": kept} if kept[-1] != "+" else {})


def branches(pattern: str) -> list[tuple[Any, Any]]:
    """Every operation of a parsed regular expression, nested ones too."""
    from re import _parser  # type: ignore[attr-defined]

    def walk(parsed: Any) -> list[tuple[Any, Any]]:
        found = []
        for operation, argument in parsed:
            found.append((operation, argument))
            inner = argument if isinstance(argument, (tuple, list)) else ()
            for part in inner:
                if isinstance(part, _parser.SubPattern):
                    found += walk(part)
                elif isinstance(part, list):
                    for each in part:
                        found += walk(each) if isinstance(each, _parser.SubPattern) else [(None, each)]
        return found

    return walk(_parser.parse(pattern))


@pytest.mark.parametrize("name", NOTES)
def test_the_form_of_every_note_is_closed(name: str) -> None:
    """Literals, alternatives and few digits only: no letters from outside, no unbounded repeat."""
    from re import _constants, _parser  # type: ignore[attr-defined]

    for operation, argument in branches(NOTES[name]):
        assert operation not in (_constants.ANY, _constants.NOT_LITERAL, _constants.GROUPREF), name
        if operation in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
            assert argument[1] <= 6, f"{name}: more than six repeats can hold a date or an id"
        if operation is _constants.IN:
            text = repr(argument)
            assert not re.search("NEGATE|WORD|SPACE", text), name
    assert _parser.parse(NOTES[name]).getwidth()[1] <= 64
    for number in ("19471231", "1947-12-31", "7741903", "QX7741903ZR", "Doe", "Doe^John"):
        assert re.fullmatch(NOTES[name], number, re.ASCII) is None


#: Names that a detail may interpolate without a numeric format, where they are no text of a header.
CLOSED_WORDS = re.compile(
    r"len\(.*\)|int\(.*\)|round\(.*\)|abs\(.*\)|math\.prod\(.*\)|sum\(.*\)|max\(.*\)|min\(.*\)|"
    r"type\(\w+\)\.__name__|.*\.(dtype|shape|ndim|size|itemsize)|.*\.shape\[.*\]|\d+|[A-Z_]+"
)


def details() -> list[tuple[str, str]]:
    """(place, source text) of what every `Quarantined(code, detail)` interpolates unformatted."""
    found = []
    for path in sorted(Path(data_pipeline.__file__).parent.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Quarantined"):
                continue
            for part in [n for a in call.args[1:2] for n in ast.walk(a) if isinstance(n, ast.FormattedValue)]:
                spec = ast.unparse(part.format_spec) if part.format_spec is not None else ""
                if not re.search(r"[fgdeE%]'?$", spec):  # these formats raise for anything but a number
                    found.append((f"{path.name}:{part.lineno}", ast.unparse(part.value)))
    return found


#: Interpolations of details that were looked at one by one: what they can hold.
LOOKED_AT = {
    "raw.modality": "closed list of readers.dicom_kinds",
    "declared": "closed list of volume.Modality, checked before",
    "n": "a number",
    "first": "a number",
    "pages": "a number",
    "image.mode": "closed list of Pillow's modes",
    "stored": "BitsStored, a number",
    "high": "HighBit, a number",
    "width": "a number",
    "' '.join(SUFFIXES)": "a constant",
    "bits": "BitsStored or a sample's size, a number",
    "places": "a number",
    "most": "a number",
    "array.dtype.kind": "one of NumPy's letters",
    "axes": "letters of NRRD kinds or a number of axes",
    "version[0]": "a number",
    "version[1]": "a number",
    "voxels": "a number",
    "voxels * dtype.itemsize": "a number",
    "size": "a number",
    "leaning": "a number",
    "what": "image or label",
    "' or '.join(wanted)": "a constant list of array names",
    "' and '.join(found)": "of the same list",
    "shape": "numbers",
    "volume.source_shape": "numbers",
    "rows": "a number",
    "columns": "a number",
    "across": "a number",
    "shown": "values of label voxels, numbers",
    "', ...' if len(unknown) > 8 else ''": "a constant",
    "detail": "put together in labels.py of figures",
    "error.code": "closed list of errors.REASONS",
    "error.detail": "the detail of another refusal",
}


def test_details_of_refusals_hold_figures_and_closed_words() -> None:
    """A detail is written to the dataset: what it interpolates is a number or was looked at."""
    unknown = [
        (place, text)
        for place, text in details()
        if not CLOSED_WORDS.fullmatch(text) and text not in LOOKED_AT
    ]
    assert not unknown, "look at these, then list them in LOOKED_AT or give them a numeric format"


@pytest.mark.parametrize(
    "name",
    [
        "Zyxquorth", "T1 Zyxquorth", "31.12.47", "t1 31 12 47", "b1947 b1231", "CT 19471231", "QX7741903ZR",
        "t1_1947-12-31", "Liver^Zyxquorth", "ct 47 12", "DWI b1000 7741",
    ],
)  # fmt: skip
def test_names_of_channels_and_structures_hold_no_dates_or_names(name: str) -> None:
    """What a file calls a channel or a structure is taken only where every word of it is known."""
    assert channel_name(name, 3) == "channel_3"
    assert allowed_name(name) is None
    hashed = public_name(name, SourceConfig(path=Path("x"), name="s"), lambda text: "0123456789abcdef")
    assert hashed == "roi_0123456789ab"
