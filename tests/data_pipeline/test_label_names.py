"""Which names of structures may be written to a dataset, and what the others become."""

from __future__ import annotations

import datetime
import hashlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.label_names import allowed_name, public_name
from data_pipeline.sources import SourceConfig

RIBS = [f"rib_{side}_{n}" for side in ("left", "right") for n in range(1, 13)]
LEVELS = [f"{part}{n}" for part, count in (("L", 5), ("T", 12), ("C", 7)) for n in range(1, count + 1)]
VERTEBRAE = [f"vertebrae_{level}" for level in ("S1", *LEVELS)]
SIDED = [
    "adrenal_gland", "kidney_cyst", "kidney", "iliac_artery", "iliac_vena", "humerus", "scapula",
    "clavicula", "femur", "hip",
    "gluteus_maximus", "gluteus_medius", "gluteus_minimus", "autochthon", "iliopsoas", "lung_upper_lobe",
    "lung_lower_lobe",
    "subclavian_artery", "common_carotid_artery", "brachiocephalic_vein",
]  # fmt: skip
TOTALSEGMENTATOR = [
    "spleen", "gallbladder", "liver", "stomach", "pancreas", "lung_middle_lobe_right", "esophagus", "trachea",
    "thyroid_gland", "small_bowel", "duodenum", "colon", "urinary_bladder", "prostate", "sacrum", "heart",
    "aorta",
    "pulmonary_vein", "brachiocephalic_trunk", "atrial_appendage_left", "superior_vena_cava",
    "inferior_vena_cava",
    "portal_vein_and_splenic_vein", "spinal_cord", "brain", "skull", "sternum", "costal_cartilages",
    *(f"{n}_{s}" for n in SIDED for s in ("left", "right")), *RIBS, *VERTEBRAE,
]  # fmt: skip
DATASETS = """
edema|non-enhancing tumor|enhancing tumour|left atrium|liver|cancer|Anterior|Posterior|PZ|TZ|pancreas
Vessel|Tumour|spleen|colon cancer primaries|lung tumours|hepatic vessel|background|right kidney
left kidney|gall bladder|esophagus|stomach|arota|postcava|right adrenal gland|left adrenal gland|duodenum
bladder|prostate/uterus|inferior vena cava|portal vein and splenic vein|rad|lad|aorta|gallbladder|kidney
tumor|cyst|masses|kidney + tumor + cyst|whole tumor|tumor core|enhancing tumor|NCR|ED|ET|NETC|SNFH|RC
resection cavity|NCR/NET|RV|MLV|LVC|myocardium|LV cavity|GTV|GTV_Mass|GTV_Edema|GTVp|GTVnd|GTV1|GTV-1
CTV_70Gy|ITV 2|GTV-T|gtv n|A_Carotid_L|Glnd_Submand_L|BrachialPlex_R|OpticNrv_L|OpticChiasm|SpinalCord
BrainStem|Bone_Mandible|Cavity_Oral|Lung_L|Lungs-GTV|Musc_Constrict|Kidney_Cortex_L|CN_VIII_L
LN_Neck_IA_L|Femur_Head_R|Parotid_L|Lens_L|Cochlea_R|Eye_L|Larynx|GreatVes|Heart|A_LAD|VB_T12|LeftLung
LiverSegment4|Third ventricle|WhiteMatter|Grey matter|T12L1Disc|L1Vertebra|Couinaud hepatic segment IV
Lesion|Nodule|Neoplasm, Primary
"""
NAMES = [
    "GTV Smith", "liver_jan_novak", "2019-03-04 lesion", "lesion 04.03.19", "Dr. Heart", "Dr Heart",
    "GTV JS", "GTV_J_S",
    "JS liver", "kidney 1234567", "liver MRN 12", "lesion 4 3", "Müller lung", "liver\u202eretsis",
    "tumour of Anna", "GTVSmith",
    "liverSmith", "SMITHliver", "Stone", "White", "Long", "Young", "Old", "Ward 7", "Iris", "GTV Brown",
    "Gross", "Wall", "Pat", "Mr Foot",
    "room 12", "7", "L", "1 2", "", "   ", "l.r", "liver" * 20, "liver; rm -rf $HOME", "<b>liver</b>",
    "liver\x00", "肝臓", "roi_Smith",
    "liver smith@example.org", "heart +49 30 12", "Heart 1931", "lesion 03/04", "19310203", "GTV 60 12",
    "liver'", "https://liver",
]  # fmt: skip


def of_secret(text: str) -> str:
    return hashlib.blake2b(text.encode(), key=b"secret", digest_size=16).hexdigest()


def source(**stated: object) -> SourceConfig:
    return SourceConfig(path=Path("/data"), **stated)


def test_the_table_of_totalsegmentator_is_whole() -> None:
    assert len(set(TOTALSEGMENTATOR)) == len(TOTALSEGMENTATOR) == 117


@pytest.mark.parametrize("name", [*TOTALSEGMENTATOR, *DATASETS.strip().replace("\n", "|").split("|")])
def test_names_of_public_datasets_and_nomenclatures_stay(name: str) -> None:
    assert allowed_name(name) == name


@pytest.mark.parametrize("name", NAMES)
def test_names_with_any_other_word_become_a_keyed_hash(name: str) -> None:
    assert allowed_name(name) is None
    public = public_name(name, source(), of_secret)
    assert re.fullmatch(r"roi_[0-9a-f]{12}", public)
    assert public != public_name(name, source(), lambda text: of_secret("other key" + text))


def test_the_recipe_names_as_it_likes() -> None:
    src = source(label_names={"GTV Smith": "tumour", "liver": "Leber 1"})
    assert public_name("GTV Smith", src, of_secret) == "tumour"
    assert public_name(" gtv  SMITH", src, of_secret) == "tumour"
    assert public_name("liver", src, of_secret) == "Leber 1"
    assert public_name("spleen", src, of_secret) == "spleen"


def test_spelling_that_differs_in_case_or_spaces_hashes_alike() -> None:
    assert public_name("GTV  smith ", source(), of_secret) == public_name("gtv SMITH", source(), of_secret)
    assert allowed_name("  right \n kidney ") == "right kidney"


KNOWN = st.sampled_from(["liver", "left", "GTV", "tumour", "upper", "lobe", "T12", "bone"])
STRANGERS = st.sampled_from(
    ["smith", "Novak", "anna", "dr", "prof", "mrn", "patient", "garcia", "wei", "o'neil"]
)


@given(
    st.lists(KNOWN, min_size=1, max_size=4), st.sampled_from(["_", " ", "-", "", "."]), STRANGERS, st.data()
)
def test_one_strange_word_anywhere_is_enough(
    known: list[str], joint: str, word: str, data: st.DataObject
) -> None:
    shown = data.draw(st.sampled_from([word, word.title(), word.upper()]))
    words = [*known]
    words.insert(data.draw(st.integers(0, len(known))), shown)
    assert allowed_name(joint.join(words)) is None


@given(st.text(max_size=40))
def test_whatever_passes_is_plain_short_and_says_itself_again(name: str) -> None:
    allowed = allowed_name(name)
    if allowed is not None:
        assert allowed.isascii()
        assert allowed.isprintable()
        assert len(allowed) <= 64
        assert allowed_name(allowed) == allowed
        assert not re.search(r"\d{3}", allowed)


@given(st.dates(), st.sampled_from(["%Y-%m-%d", "%d.%m.%y", "%y%m%d", "%Y%m%d", "%m/%d", "%d %m %Y"]), KNOWN)
def test_no_date_passes(date: datetime.date, form: str, word: str) -> None:
    for name in (f"{date.strftime(form)} {word}", f"{word}_{date.strftime(form)}"):
        assert allowed_name(name) is None
