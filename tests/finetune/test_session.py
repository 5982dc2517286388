"""`PromptableSession` and `segment`: frames of points, orientations, undo, errors, images of any size."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import save_file

from data_pipeline.intensity import statistics
from engine.errors import UserError
from finetune.images import normalised_volume, volume_of
from finetune.inference import Predictor
from finetune.promptable import HeadConfig, PromptableModel
from finetune.prompts import PromptList
from finetune.session import PromptableSession, segment
from finetune.weights import find_model
from model.encoder import EncoderConfig
from model.plan import AdaptationPlan, write_plan

ORIENTATIONS = ("RAS", "LPS", "LAS", "PSR", "LIA", "LPI", "RPI")
SMALL = HeadConfig(widths=(4, 8, 12, 16), heads=2, layers=1, window=(24, 24, 24))


@pytest.fixture(scope="module")
def net():
    """Random weights, scaled so that a mask is neither empty nor full and depends on where one clicks."""
    torch.manual_seed(4)
    net = PromptableModel(SMALL).eval()
    with torch.no_grad():
        net.prompt.enter.weight.mul_(4)
        net.prompt.base.mul_(4)
    return net


@pytest.fixture(scope="module")
def image():
    """14 x 17 x 20 voxels (x, y, z), anisotropic, off the origin, in LPS."""
    rng = np.random.default_rng(0)
    found = sitk.GetImageFromArray(rng.normal(100, 20, (20, 17, 14)).astype(np.float32))
    found.SetSpacing((1.0, 1.25, 1.5))
    found.SetOrigin((-31.5, 12.25, 40.0))
    return found


def session_for(net, image, **options):
    session = PromptableSession(net, precision="fp32")
    session.set_image(image, modality="MR", **options)
    return session


def to_lps(mask, like):
    """A mask on the grid of `like`, as an array in LPS order."""
    found = sitk.GetImageFromArray(mask.astype(np.uint8))
    found.CopyInformation(like)
    return sitk.GetArrayFromImage(sitk.DICOMOrient(found, "LPS")).astype(bool)


def test_one_anatomical_point_gives_one_mask_whatever_the_frame_and_orientation(net, image, tmp_path):
    lps = image.TransformIndexToPhysicalPoint((4, 11, 6))
    ras = (-lps[0], -lps[1], lps[2])
    masks = {}
    for orientation in ORIENTATIONS:
        turned = sitk.DICOMOrient(image, orientation)
        path = tmp_path / f"{orientation}.nii.gz"
        sitk.WriteImage(turned, str(path))
        index = turned.TransformPhysicalPointToIndex(lps)
        for source in (turned, path):
            session = session_for(net, source)
            for point, frame in ((index, "index"), (ras, "ras"), (lps, "lps")):
                session.reset()
                session.add_point(point, frame=frame)
                masks[orientation, type(source).__name__, frame] = to_lps(session.predict(), turned)
    session = session_for(net, sitk.GetArrayFromImage(image), spacing=(1.5, 1.25, 1.0))
    session.add_point((6, 11, 4))
    masks["array"] = session.predict()
    first = masks["LPS", "Image", "index"]
    assert 0 < first.sum() < first.size
    for name, mask in masks.items():
        assert np.array_equal(mask, first), name
    session = session_for(net, image)
    session.add_point((9, 2, 15))
    assert not np.array_equal(session.predict(), first)


def test_boxes_follow_the_orientation_too(net, image):
    masks = []
    corners = [image.TransformIndexToPhysicalPoint(c) for c in ((2, 3, 4), (9, 8, 12))]
    for orientation in ORIENTATIONS:
        turned = sitk.DICOMOrient(image, orientation)
        session = session_for(net, turned)
        session.add_box(*(turned.TransformPhysicalPointToIndex(c) for c in corners))
        masks.append(to_lps(session.predict(), turned))
    assert all(np.array_equal(masks[0], m) for m in masks)


def test_undo_reset_and_the_same_prompts_again(net, image):
    session = session_for(net, image)
    points = [(4, 11, 6), (9, 2, 15), (7, 7, 7)]
    seen = []
    for number, point in enumerate(points):
        session.add_point(point, positive=number != 1)
        seen.append((session.predict(), session.logits, session.iou))
    for back in (1, 0):
        assert session.undo()
        assert np.array_equal(session.predict(), seen[back][0])
        assert np.array_equal(session.logits, seen[back][1])
        assert session.iou == seen[back][2]
    session.add_point(points[1], positive=False)
    assert np.array_equal(session.predict(), seen[1][0])
    session.reset()
    assert not session.undo()
    session.add_point(points[0])
    assert np.array_equal(session.predict(), seen[0][0])


def test_undo_of_one_of_two_prompts_given_together(net, image):
    session = session_for(net, image)
    session.add_point((4, 11, 6))
    alone = session.predict()
    session.reset()
    session.add_point((4, 11, 6))
    session.add_point((9, 2, 15), positive=False)
    assert not np.array_equal(session.predict(), alone)
    session.undo()
    assert np.array_equal(session.predict(), alone)
    assert session.undo()
    assert not session.undo()


def test_mistakes_are_told_in_one_line(net, image):
    session = PromptableSession(net)
    with pytest.raises(UserError, match="set_image first"):
        session.add_point((1, 1, 1))
    with pytest.raises(UserError, match="set_image first"):
        session.predict()
    session.set_image(image, modality="MR")
    with pytest.raises(UserError, match="no prompt"):
        session.predict()
    for point, frame in (
        ((14, 0, 0), "index"),
        ((-1, 0, 0), "index"),
        ((0, 0, 500), "ras"),
        ((1, 2), "index"),
    ):
        with pytest.raises(UserError) as error:
            session.add_point(point, frame=frame)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="frame"):
        session.add_point((1, 1, 1), frame="mm")
    with pytest.raises(UserError, match="spacing"):
        session.set_image(np.zeros((4, 4, 4)), modality="MR")
    with pytest.raises(UserError, match="channels"):
        session.set_image(np.arange(1024.0).reshape(2, 8, 8, 8), spacing=(1, 1, 1), modality="MR")
    with pytest.raises(UserError, match="no such"):
        PromptableSession("/nowhere/at/all")


def test_the_image_is_normalised_as_the_builder_does(image):
    volume = volume_of(image, None, "MR").to_lps()
    norm = statistics(volume)[0]
    np.testing.assert_allclose(normalised_volume(volume, None)[0], norm.apply(volume.voxels[0]), atol=1e-4)
    ct = volume_of(image, None, "CT").to_lps()
    np.testing.assert_allclose(normalised_volume(ct, None)[0], (ct.voxels[0] + 200) / 500, atol=1e-5)


def test_segment_writes_the_geometry_of_the_image(net, image, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    head = net.config.model_dump(mode="json")
    write_plan(folder / "plan.json", AdaptationPlan(architecture=EncoderConfig(), head=head))
    oblique = sitk.Image(image)
    turn = sitk.Euler3DTransform((0, 0, 0), 0.1, 0.2, 0.3).GetMatrix()
    oblique.SetDirection(turn)
    path, out = tmp_path / "image.nii.gz", tmp_path / "deep" / "seg.nii.gz"
    sitk.WriteImage(oblique, str(path))
    done = segment(folder, path, out, points=[((4, 11, 6), True, "index")], modality="MR")
    source, mask = sitk.ReadImage(str(path)), sitk.ReadImage(str(out))
    assert mask.GetSize() == source.GetSize()
    np.testing.assert_allclose(mask.GetSpacing(), source.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(mask.GetOrigin(), source.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(mask.GetDirection(), source.GetDirection(), atol=1e-6)
    assert done.voxels == int(sitk.GetArrayFromImage(mask).sum())
    assert set(np.unique(sitk.GetArrayFromImage(mask))) <= {0, 1}
    with pytest.raises(UserError, match="cannot be written"):
        segment(folder, path, tmp_path / "seg.xyz", points=[((4, 11, 6), True, "index")], modality="MR")


class Follows(torch.nn.Module):
    """A stand-in that knows the answer: the bright voxels, if the first click lies on one."""

    def __init__(self, window):
        super().__init__()
        self.config = HeadConfig(window=window)
        self.encoder = None
        self.prompt = torch.nn.Module()
        self.prompt.base = torch.nn.Parameter(torch.zeros(1))
        self.shapes = []

    def encode(self, image, spacing, geometry, axes, valid):
        self.shapes.append(tuple(image.shape[2:]))
        return image

    def answer(self, features, prompts, previous):
        return (features - 0.5) * 10, torch.ones(len(features))


@pytest.mark.parametrize("shape", [(30, 40, 50), (90, 33, 120), (1, 200, 150)])
def test_an_object_larger_than_the_window_is_found_whole(shape):
    truth = np.zeros(shape, np.float32)
    truth[tuple(slice(n // 8, n - n // 8) if n > 1 else slice(0, 1) for n in shape)] = 1.0
    net = Follows((24, 24, 24) if shape[0] > 1 else (1, 64, 64))
    geometry = "planar" if shape[0] == 1 else "volume"
    predictor = Predictor(net, truth[None], (1, 1, 1), geometry, precision="fp32", cached_windows=3)
    where = tuple(float(n // 2) for n in shape)
    said = PromptList([(where, 1)])
    predictor.predict(said, said)
    wrong = (predictor.logits > 0) != (truth > 0)
    assert wrong.mean() < 0.02
    assert len(predictor._features) <= 3
    looks = len(net.shapes)
    more = PromptList([((0.0, 0.0, 0.0), -1)])
    predictor.predict(PromptList(said.clicks + more.clicks), more)
    assert len(net.shapes) <= looks + 1  # nothing changed, so nothing is looked at but the click's own window
    assert max(np.prod(s) for s in net.shapes) <= 2.1 * 24**3 if shape[0] > 1 else True


def test_a_small_object_in_a_large_image_costs_one_window():
    truth = np.zeros((100, 100, 100), np.float32)
    truth[70:76, 20:26, 40:46] = 1.0
    net = Follows((24, 24, 24))
    predictor = Predictor(net, truth[None], (1, 1, 1), precision="fp32")
    said = PromptList([((73.0, 22.0, 43.0), 1)])
    predictor.predict(said, said)
    assert np.array_equal(predictor.logits > 0, truth > 0)
    assert net.shapes == [(24, 24, 24)]


def test_a_box_larger_than_the_window_is_looked_at_from_further_away():
    truth = np.zeros((64, 64, 64), np.float32)
    truth[4:60, 4:60, 4:60] = 1.0
    predictor = Predictor(Follows((24, 24, 24)), truth[None], (1, 1, 1), precision="fp32")
    said = PromptList(boxes=[((4.0, 4.0, 4.0), (59.0, 59.0, 59.0))])
    predictor.predict(said, said)
    assert ((predictor.logits > 0) != (truth > 0)).mean() < 0.02


def test_a_model_folder_is_found_by_file_and_by_run(tmp_path):
    for update in ("update-00000010", "update-00000020"):
        folder = tmp_path / "checkpoints" / update
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"")
        if update.endswith("10"):
            (folder / "complete.json").write_text("{}")
    assert find_model(tmp_path)[0].parent.name == "update-00000010"


def test_an_image_that_is_refused_leaves_the_one_before_as_it_was(net, image):
    session, other = session_for(net, image), session_for(net, image)
    with pytest.raises(UserError, match="spacing"):
        session.set_image(np.zeros((9, 9, 9)), modality="MR")
    for each in (session, other):
        each.add_point((4, 11, 6))
    assert np.array_equal(session.predict(), other.predict())
