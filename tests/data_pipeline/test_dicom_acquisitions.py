"""One DICOM series to its acquisitions: what is split, what is a repeat in time, what is refused."""

from __future__ import annotations

import tracemalloc
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from dicom_files import NORMAL, ORIGIN, dataset, enhanced, sequence_of, series_of, write
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from data_pipeline.errors import Quarantined
from data_pipeline.readers import read, read_all
from data_pipeline.readers.dicom import decode_all
from data_pipeline.readers.dicom_frames import Frame
from data_pipeline.readers.raw import Raw

SLICES = 5


def planes(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 3000, (*shape, 6, 7)).astype(np.uint16)


def crossed(array: np.ndarray, tags) -> list[tuple[int, np.ndarray, dict]]:
    """Slices of (groups, positions, y, x), with the elements that ``tags`` gives a group."""
    return [(k, array[g, k], tags(g)) for g, k in product(range(array.shape[0]), range(array.shape[1]))]


def code_of(path: Path, **options) -> str:
    with pytest.raises(Quarantined) as refused:
        decode_all(path, **options)
    return refused.value.code


def assert_frames(raws: list[Raw], *expected: np.ndarray) -> None:
    assert len(raws) == len(expected)
    for raw, frames in zip(raws, expected):
        np.testing.assert_array_equal(raw.frames, frames.reshape(-1, *frames.shape[-3:]))


@pytest.mark.parametrize(
    "tags",
    [
        pytest.param(lambda g: {"EchoNumbers": g + 1, "EchoTime": 5.0 + g}, id="echo"),
        pytest.param(lambda g: {"EchoTime": 5.0 + g}, id="echo time alone"),
        pytest.param(lambda g: {"DiffusionBValue": 500.0 * g}, id="b-value"),
        pytest.param(lambda g: {"InversionTime": 100.0 * (g + 1)}, id="inversion time"),
        pytest.param(lambda g: {"FlipAngle": 5.0 * (g + 1)}, id="flip angle"),
        pytest.param(
            lambda g: {"ImageType": ["ORIGINAL", "PRIMARY", "DIXON", ("IN_PHASE", "OPP_PHASE", "W")[g]]},
            id="Dixon",
        ),
        pytest.param(lambda g: {"Modality": "CT", "AcquisitionNumber": g + 1}, id="CT phases"),
        pytest.param(lambda g: {"Modality": "CT", "ConvolutionKernel": ("A", "B", "C")[g]}, id="CT kernels"),
        pytest.param(lambda g: {"Modality": "CT", "KVP": (80, 100, 140)[g]}, id="CT energies"),
    ],
)
def test_parameters_that_differ_at_a_position_make_volumes(tmp_path: Path, tags) -> None:
    array = planes(3, SLICES)
    raws = decode_all(write(tmp_path, crossed(array, tags)))
    assert_frames(raws, *array)
    assert [raw.provenance["acquisition"] for raw in raws] == ["0 of 3", "1 of 3", "2 of 3"]
    assert len(frozenset.union(*(raw.instances for raw in raws))) == 3 * SLICES
    with pytest.raises(Quarantined, match="several_acquisitions"):
        read(tmp_path, units="arbitrary")
    assert len(read_all(tmp_path, units="arbitrary")) == 3


@pytest.mark.parametrize(
    "tags",
    [
        pytest.param(lambda g: {"TemporalPositionIdentifier": g + 1}, id="temporal position"),
        pytest.param(lambda g: {"TriggerTime": 40.0 * g}, id="trigger time"),
        pytest.param(lambda g: {"NominalPercentageOfCardiacPhase": 10.0 * g}, id="cardiac phase"),
        pytest.param(lambda g: {"AcquisitionNumber": g + 1}, id="MR acquisition number"),
        pytest.param(
            lambda g: {
                "DiffusionBValue": 1000.0,
                "DiffusionGradientOrientation": [[1, 0, 0], [0, 1, 0], [0, 0, 1]][g],
            },
            id="directions",
        ),
        pytest.param(lambda g: {"AcquisitionTime": f"10000{g}"}, id="acquisition time"),
        pytest.param(lambda g: {"Modality": "PT", "FrameReferenceTime": 1000.0 * g}, id="dynamic PET"),
        pytest.param(lambda g: {}, id="instance number"),
    ],
)
def test_repeats_in_time_are_frames_in_their_order(tmp_path: Path, tags) -> None:
    array = planes(3, SLICES)
    assert_frames(decode_all(write(tmp_path, crossed(array, tags))), array)


def test_trigger_times_that_differ_from_slice_to_slice_are_ranked(tmp_path: Path) -> None:
    array = planes(3, SLICES)
    slices = [
        (k, array[t, k], {"TriggerTime": 30.0 * t + 7.0 * k}) for t, k in product(range(3), range(SLICES))
    ]
    assert_frames(decode_all(write(tmp_path, slices)), array)


def test_directions_are_repeats_within_their_shell(tmp_path: Path) -> None:
    array = planes(6, SLICES)
    b_values = (0, 0, 995, 1005, 2000, 2000)
    turns = ([0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1])

    def tags(g: int) -> dict:
        return {
            "DiffusionBValue": float(b_values[g]),
            "DiffusionGradientOrientation": turns[g],
            "EchoTime": 80.0,
        }

    raws = decode_all(write(tmp_path, crossed(array, tags)))
    assert_frames(raws, array[:2], array[2:4], array[4:])
    assert [raw.provenance["b_value"] for raw in raws] == ["0", "1000", "2000"]
    assert {raw.provenance["sequence"] for raw in raws} == {"DWI"}
    volumes = read_all(tmp_path, more_frames=3)
    assert [v.provenance["b_value"] for v in volumes] == ["0", "0", "1000", "1000", "2000", "2000"]


@pytest.mark.parametrize("vendor", ["SIEMENS", "GE", "PHILIPS"])
def test_private_b_values_split_too(tmp_path: Path, vendor: str) -> None:
    array = planes(2, SLICES)
    uid = "1.2.3.4"
    for n, (g, k) in enumerate(product(range(2), range(SLICES))):
        ds = dataset(array[g, k], ORIGIN + 2.0 * k * NORMAL, uid, n + 1, Modality="MR", RescaleSlope=None,
                     RescaleIntercept=None)  # fmt: skip
        value = (50, 800)[g]
        if vendor == "SIEMENS":
            ds.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", str(value))
        elif vendor == "GE":
            ds.ScanningSequence = ["EP", "SE"]
            ds.private_block(0x0043, "GEMS_PARM_01", create=True).add_new(
                0x39, "IS", [10**9 + value, 8, 0, 0]
            )
        else:
            ds.private_block(0x2001, "Philips Imaging DD 001", create=True).add_new(0x03, "FL", float(value))
        ds.save_as(tmp_path / f"{n}.dcm", enforce_file_format=True)
    raws = decode_all(tmp_path)
    assert_frames(raws, *array)
    assert [raw.provenance["b_value"] for raw in raws] == ["50", "800"]


def test_the_b_value_of_a_siemens_header_written_as_bytes_is_read(tmp_path: Path) -> None:
    ds = dataset(planes(1, 1)[0, 0], ORIGIN, "1.2.3", Modality="MR")
    ds.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "OB", b"1000")
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert decode_all(tmp_path)[0].provenance["b_value"] == "1000"


def test_an_incomplete_acquisition_is_refused_and_counted(tmp_path: Path) -> None:
    array = planes(3, SLICES)
    slices = crossed(array, lambda g: {"EchoNumbers": g + 1})
    raws = decode_all(write(tmp_path / "end", slices[:-1]))
    assert_frames(raws, *array[:2])
    assert {raw.provenance["acquisitions_refused"] for raw in raws} == {"1"}
    raws = decode_all(write(tmp_path / "middle", slices[:2] + slices[3:]))
    assert_frames(raws, *array[1:])


def test_an_incomplete_time_point_is_left_out_and_counted(tmp_path: Path) -> None:
    array = planes(3, SLICES)
    slices = crossed(array, lambda g: {"TemporalPositionIdentifier": g + 1})
    raws = decode_all(write(tmp_path, slices[:-2]))
    assert_frames(raws, array[:2])
    assert raws[0].provenance["frames_refused"] == "1"


def test_all_acquisitions_incomplete_is_a_refusal(tmp_path: Path) -> None:
    array = planes(2, SLICES)
    slices = [s for s in crossed(array, lambda g: {"EchoNumbers": g + 1}) if s[0] != 2]
    assert code_of(write(tmp_path, slices)) == "missing_slices"


def test_repeats_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    array = planes(2, SLICES)
    same = crossed(array, lambda g: {"InstanceNumber": 1})
    assert code_of(write(tmp_path / "a", same)) == "duplicate_slices"
    few = crossed(array, lambda g: {})[: SLICES + 2]
    assert code_of(write(tmp_path / "b", few)) == "duplicate_slices"


def test_acquisition_numbers_that_only_count_slices_split_nothing(tmp_path: Path) -> None:
    array = planes(2, SLICES)
    slices = [(k, array[0, k], {"Modality": "CT", "AcquisitionNumber": k + 1}) for k in range(SLICES)]
    assert_frames(decode_all(write(tmp_path / "one", slices)), array[0])
    both = [
        (k, array[t, k], {"Modality": "CT", "AcquisitionNumber": t * SLICES + k + 1})
        for t, k in product(range(2), range(SLICES))
    ]
    assert_frames(decode_all(write(tmp_path / "two", both)), array)


def test_ct_phases_of_other_extent_are_each_whole_but_monitoring_slices_are_not(tmp_path: Path) -> None:
    array = planes(2, 8)
    slices = [(k, array[0, k], {"AcquisitionNumber": 1}) for k in range(8)]
    slices += [(k, array[1, k], {"AcquisitionNumber": 2}) for k in range(2, 6)]
    raws = decode_all(write(tmp_path / "a", slices, Modality="CT"))
    assert_frames(raws, array[0], array[1, 2:6])
    slices = slices[:8] + [(3, array[1, n], {"AcquisitionNumber": n + 2}) for n in range(3)]
    # The numbers of the bolus tracking count slices: told apart by time they are incomplete time points.
    raws = decode_all(write(tmp_path / "b", slices, Modality="CT"))
    assert [raw.frames.shape[:2] for raw in raws] == [(1, 8)]


def test_parallel_stacks_with_a_gap_are_split_by_acquisition_number(tmp_path: Path) -> None:
    array = planes(2, SLICES)
    slices = [
        (k + 20 * g, array[g, k], {"AcquisitionNumber": g + 1}) for g, k in product(range(2), range(SLICES))
    ]
    assert_frames(decode_all(write(tmp_path / "a", slices)), *array)
    joined = [(k, pixels, {"AcquisitionNumber": 1}) for k, pixels, _ in slices]
    assert code_of(write(tmp_path / "b", joined)) == "missing_slices"


def test_whole_stacks_of_other_orientation_or_size_are_volumes(tmp_path: Path) -> None:
    def mixed(folder: Path, count: int) -> Path:
        array = planes(2, count)
        uid = "1.2.9.9"
        series_of(folder / "a", array[0], uid=uid)
        flat = [np.array([0.0, 0.0, 3.0 * k]) for k in range(count)]
        series_of(folder / "b", array[1], flat, uid=uid, ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
        return folder

    raws = decode_all(mixed(tmp_path / "whole", 8))
    assert_frames(raws, *planes(2, 8))
    assert code_of(mixed(tmp_path / "localizer", 5)) == "mixed_orientation"
    wide = planes(1, 9)[0]
    series_of(tmp_path / "size", wide, uid="1.2.5")
    series_of(tmp_path / "size" / "2", wide[:, :4], uid="1.2.5")
    assert [raw.frames.shape for raw in decode_all(tmp_path / "size")] == [(1, 9, 6, 7), (1, 9, 4, 7)]
    series_of(tmp_path / "odd", wide, uid="1.2.6")
    series_of(tmp_path / "odd" / "2", wide[:1, :4], uid="1.2.6")
    assert code_of(tmp_path / "odd") == "mixed_shape"


def test_one_uid_for_all_slices_loses_none(tmp_path: Path) -> None:
    array = planes(1, SLICES)[0]
    raws = decode_all(series_of(tmp_path, array, SOPInstanceUID="1.2.3"))
    assert_frames(raws, array)


def test_magnitude_is_kept_and_the_other_parts_of_the_signal_leave(tmp_path: Path) -> None:
    array = planes(4, SLICES)
    parts = ("M", "P", "R", "I")
    slices = crossed(array, lambda g: {"ImageType": ["ORIGINAL", "PRIMARY", parts[g], "ND"]})
    raws = decode_all(write(tmp_path, slices), series=sorted(tmp_path.iterdir()))
    assert_frames(raws, array[0])
    assert raws[0].provenance["objects_refused"] == str(3 * SLICES)


def content(**elements) -> dict:
    return {"FrameContentSequence": sequence_of(**elements)}


def test_enhanced_frames_split_by_b_value_and_repeat_by_direction(tmp_path: Path) -> None:
    kinds = [(0.0, "NONE", None), (1000.0, "DIRECTIONAL", [1, 0, 0]), (1000.0, "DIRECTIONAL", [0, 1, 0]),
             (1000.0, "ISOTROPIC", None)]  # fmt: skip
    array = planes(4, SLICES)
    order = [(g, k) for k in range(SLICES) for g in range(4)]

    def groups(n: int) -> dict:
        b, directionality, vector = kinds[order[n][0]]
        (item,) = sequence_of(DiffusionBValue=b, DiffusionDirectionality=directionality)
        if vector is not None:
            item.DiffusionGradientDirectionSequence = sequence_of(DiffusionGradientOrientation=vector)
        return {"MRDiffusionSequence": [item], **content(StackID="1", InStackPositionNumber=order[n][1] + 1)}

    frames = np.stack([array[g, k] for g, k in order])
    ds = enhanced(
        frames, [k for _, k in order], groups, ImageType=["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE"]
    )
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    raws = decode_all(tmp_path / "a.dcm")
    assert_frames(raws, array[0], array[1:3], array[3])
    assert [raw.provenance["b_value"] for raw in raws] == ["0", "1000", "1000"]
    assert raws[0].instances == {str(ds.SOPInstanceUID)}


def test_enhanced_time_points_echoes_and_parts(tmp_path: Path) -> None:
    array = planes(3, SLICES)
    order = [(g, k) for g in range(3) for k in range(SLICES)]
    frames, positions = array.reshape(-1, 6, 7), [k for _, k in order]
    enhanced(frames, positions, lambda n: content(TemporalPositionIndex=3 - order[n][0])).save_as(
        tmp_path / "t.dcm"
    )
    assert_frames(decode_all(tmp_path / "t.dcm"), array[::-1])
    enhanced(
        frames,
        positions,
        lambda n: {"MREchoSequence": sequence_of(EffectiveEchoTime=10.0 * (order[n][0] + 1))},
    ).save_as(tmp_path / "e.dcm")
    raws = decode_all(tmp_path / "e.dcm")
    assert_frames(raws, *array)
    assert [raw.provenance["EchoTime"] for raw in raws] == ["10", "20", "30"]

    parts = ("MAGNITUDE", "PHASE", "MAGNITUDE")
    kinds = ("NONE", "NONE", "ADC")

    def typed(n: int) -> dict:
        g = order[n][0]
        return {
            "MRImageFrameTypeSequence": sequence_of(
                FrameType=["ORIGINAL", "PRIMARY", "DIFFUSION", kinds[g]], ComplexImageComponent=parts[g]
            )
        }

    enhanced(frames, positions, typed, ComplexImageComponent="MIXED").save_as(tmp_path / "c.dcm")
    raws = decode_all(tmp_path / "c.dcm")
    assert_frames(raws, array[0])
    assert raws[0].provenance["objects_refused"] == str(2 * SLICES)


def test_parallel_stacks_of_an_enhanced_object_are_volumes(tmp_path: Path) -> None:
    array = planes(2, SLICES)
    order = [(g, k) for g in range(2) for k in range(SLICES)]
    positions = [k + 11 * g for g, k in order]
    ds = enhanced(array.reshape(-1, 6, 7), positions, lambda n: content(StackID=str(order[n][0] + 1)))
    ds.save_as(tmp_path / "a.dcm")
    assert_frames(decode_all(tmp_path / "a.dcm"), *array)


def test_an_enhanced_object_a_time_point_is_one_series(tmp_path: Path) -> None:
    array = planes(3, SLICES)
    for g in range(3):
        ds = enhanced(array[g], range(SLICES), InstanceNumber=g + 1, SeriesInstanceUID="1.2.3")
        ds.save_as(tmp_path / f"{9 - g}.dcm")
    assert_frames(decode_all(tmp_path), array)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    echoes=st.integers(1, 3),
    times=st.integers(1, 3),
    slices=st.integers(2, 4),
    seed=st.integers(0, 2**31),
)
def test_any_crossing_in_any_order_is_taken_apart(
    tmp_path_factory: pytest.TempPathFactory, echoes: int, times: int, slices: int, seed: int
) -> None:
    array = np.arange(echoes * times * slices, dtype=np.uint16).reshape(echoes, times, slices)
    array = np.broadcast_to(array[..., None, None], (*array.shape, 2, 2))
    made = [
        (k, np.ascontiguousarray(array[e, t, k]), {"EchoNumbers": e + 1, "TemporalPositionIdentifier": t + 1})
        for e, t, k in product(range(echoes), range(times), range(slices))
    ]
    made = [made[n] for n in np.random.default_rng(seed).permutation(len(made))]
    assert_frames(decode_all(write(tmp_path_factory.mktemp("s"), made)), *array)


@pytest.mark.parametrize("kind", ["classic", "enhanced"])
def test_decoding_holds_about_twice_the_voxels(tmp_path: Path, kind: str) -> None:
    array = np.random.default_rng(0).integers(0, 4096, (40, 256, 256)).astype(np.uint16)
    if kind == "classic":
        series_of(tmp_path, array)
    else:
        enhanced(array, range(40)).save_as(tmp_path / "a.dcm")
    files = sorted(tmp_path.iterdir())
    decode_all(tmp_path, series=files[:1])  # imports
    tracemalloc.start()
    raws = decode_all(tmp_path, series=files)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_frames(raws, array)
    assert peak < 2.5 * array.nbytes


def test_headers_are_searched_a_set_number_of_times_a_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def searches(times: int) -> float:
        calls = 0
        get = Frame.get

        def counted(self, *names):
            nonlocal calls
            calls += 1
            return get(self, *names)

        array = planes(times, SLICES)
        folder = write(tmp_path / str(times), crossed(array, lambda g: {"TemporalPositionIdentifier": g + 1}))
        with monkeypatch.context() as patch:
            patch.setattr(Frame, "get", counted)
            assert_frames(decode_all(folder), array)
        return calls / (times * SLICES)

    assert searches(24) < 1.2 * searches(6)


def test_a_legacy_converted_object_is_the_series_it_was_made_of(tmp_path: Path) -> None:
    array = planes(1, SLICES)[0]
    series_of(tmp_path / "a", array, PatientBirthDate="", PatientSex="", StudyDate="20200101", StudyTime="10",
              StudyID="1", AccessionNumber="", ReferringPhysicianName="", SeriesNumber=1, Manufacturer="GE",
              FrameOfReferenceUID="1.2.3", PositionReferenceIndicator="", AcquisitionNumber=1)  # fmt: skip
    classic = [dcmread(path) for path in (tmp_path / "a").iterdir()]
    converted = LegacyConvertedEnhancedCTImage(classic, "1.2.3.5", 2, "1.2.3.6", 1)
    converted.save_as(tmp_path / "b.dcm")
    ours, theirs = read(tmp_path / "a"), read(tmp_path / "b.dcm")
    np.testing.assert_array_equal(theirs.voxels, ours.voxels)
    np.testing.assert_allclose(theirs.source_affine, ours.source_affine)
    np.testing.assert_array_equal(theirs.real(0), ours.real(0))


@pytest.mark.parametrize("stated", [10, 12])
def test_an_enhanced_object_with_another_number_of_frames_than_it_describes(
    tmp_path: Path, stated: int
) -> None:
    frames = np.arange(12 * 12, dtype=np.uint16).reshape(12, 3, 4)
    ds = enhanced(frames, range(11))
    ds.NumberOfFrames, ds.PixelData = stated, frames[:stated].tobytes()
    ds.save_as(tmp_path / "a.dcm")
    assert code_of(tmp_path / "a.dcm") == "unreadable"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_enhanced_headers_damaged_anywhere_are_refused_not_raised(tmp_path: Path) -> None:
    enhanced(planes(1, 2)[0], range(2), lambda n: content(StackID="1")).save_as(tmp_path / "a.dcm")
    whole = (tmp_path / "a.dcm").read_bytes()
    random, outcomes = np.random.default_rng(0), set()
    for _ in range(150):
        damaged = bytearray(whole)
        for position in random.integers(0, len(whole), random.integers(1, 5)):
            damaged[position] = random.integers(0, 256)
        (tmp_path / "a.dcm").write_bytes(damaged)
        try:
            decode_all(tmp_path / "a.dcm")
            outcomes.add("read")
        except Quarantined as error:
            outcomes.add(error.code)
    assert {"read", "unreadable"} <= outcomes
