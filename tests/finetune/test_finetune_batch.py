"""Crops to windows: placement, classes, ignored voxels, augmentation keyed by the place in the order."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.order import Draw
from data_pipeline.stream import Crop
from engine.errors import UserError
from finetune.batch import IGNORE, INVALID, Collate, normalised, place
from finetune.recipe import AugmentConfig

NORM = np.array([[1.0, 0.0, 0.0, 200.0, 100.0, 50.0, 0.0]])


def crop(shape=(10, 12, 14), index=3, axes=(0, 1, 2), spacing=(1.0, 1.0, 1.0), layers=1, channels=1):
    rng = np.random.default_rng(index)
    voxels = rng.integers(0, 200, (channels, *shape)).astype(np.int16)
    seg = np.zeros((layers, *shape), np.uint8)
    seg[0, 1:-1, 2:6, 2:6] = 1
    seg[-1, 1:-1, 7:10, 7:10] = 2
    draw = Draw(
        index,
        0,
        0,
        0,
        0,
        0,
        0,
        (0, 0, 0),
        shape,
        (1, 1, 1),
        (1.0, 1.0, 1.0),
        axes,
        (0.0, 0.0, 0.0),
        spacing,
        0,
    )
    return Crop(draw, "key", "MR", voxels, np.repeat(NORM, channels, 0), seg, False)


def collate(augment=None, geometry="volume", window=(16, 16, 16), channels=1, seed=0, minimum=1):
    return Collate([geometry], window, channels, augment, minimum, seed)


def test_a_crop_is_centred_and_what_lies_outside_is_invalid_unknown_and_air():
    windows = collate()(0, 0, [crop()]).windows[0]
    assert windows.image.shape == (1, 1, 16, 16, 16)
    inside = windows.valid[0].numpy()
    assert inside.sum() == 10 * 12 * 14
    assert inside[3:13, 2:14, 1:15].all()
    np.testing.assert_allclose(windows.image[0, 0].numpy()[~inside], (0 - 100) / 50)
    expected = (crop().voxels[0] - 100.0) / 50
    np.testing.assert_allclose(
        windows.image[0, 0].numpy()[inside].reshape(expected.shape), expected, atol=1e-5
    )
    assert not (windows.known[0].numpy() & ~inside).any()


def test_every_class_present_is_asked_for_evenly():
    asked = []
    for index in range(60):
        windows = collate()(0, 0, [crop(index=index)]).windows[0]
        asked.append(int(windows.truth.sum()))
    sizes = {8 * 4 * 4, 8 * 3 * 3}
    assert set(asked) == sizes
    assert 15 <= asked.count(8 * 4 * 4) <= 45


def test_small_objects_are_asked_for_only_where_there_is_no_other():
    asked = {int(collate(minimum=100)(0, 0, [crop(index=i)]).windows[0].truth.sum()) for i in range(20)}
    assert asked == {8 * 4 * 4}


def test_layers_overlap_and_ignored_voxels_are_unknown_in_their_layer_only():
    one = crop(layers=2)
    one.seg[0, 0] = IGNORE
    for index in range(12):
        windows = collate()(
            0, 0, [Crop(crop(index=index).draw, "k", "MR", one.voxels, one.norm, one.seg, False)]
        ).windows[0]
        unknown = (windows.valid & ~windows.known)[0]
        first = int(windows.truth.sum()) == 8 * 4 * 4
        assert int(unknown.sum()) == (12 * 14 if first else 0)


def test_augmentation_depends_on_the_place_in_the_order_only():
    everything = AugmentConfig(affine=1.0)
    a, b = crop(index=3), crop(index=4)
    alone = collate(everything)(0, 0, [a]).windows[0]
    together = collate(everything)(7, 2, [b, a]).windows[0]
    np.testing.assert_array_equal(alone.image[0], together.image[1])
    np.testing.assert_array_equal(alone.truth[0], together.truth[1])
    assert not np.array_equal(alone.image[0], collate(everything, seed=1)(0, 0, [a]).windows[0].image[0])
    assert not np.array_equal(alone.image[0], collate()(0, 0, [a]).windows[0].image[0])


def test_image_and_label_are_turned_alike():
    """An image that is its own label must still agree with it after rotation, zoom and flips."""
    for index in range(6):
        base = crop(index=index, shape=(16, 16, 16))
        seg = np.zeros((1, 16, 16, 16), np.uint8)
        seg[0, 4:12, 3:10, 5:14] = 1
        same = Crop(base.draw, "k", "CT", (seg * 200).astype(np.int16), base.norm, seg, False)
        config = AugmentConfig(affine=1.0, gain=0, shift=0, gamma=0, noise=0)
        windows = collate(config)(0, 0, [same]).windows[0]
        bright = windows.image[0, 0].numpy() > 0
        truth = windows.truth[0].numpy()
        assert truth.sum() > 150
        assert 2 * (bright & truth).sum() / (bright.sum() + truth.sum()) > 0.95


def test_rotation_is_in_mm():
    """A quarter turn about x of a 2 x 1 mm grid maps 4 voxels of z to 8 of y."""
    from finetune.batch import draw_affine

    class Quarter:
        def random(self, *_):
            return 0.0

        def uniform(self, low, high, size=None):
            return np.array([0.0, 0.0, 90.0]) if size == 3 else 0.0

    matrix = draw_affine(Quarter(), AugmentConfig(), (2.0, 1.0, 1.0), in_plane=False)
    np.testing.assert_allclose(np.abs(matrix @ np.array([0, 8, 0])), [4, 0, 0], atol=1e-9)


def test_the_identity_places_without_interpolation():
    image = np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float32)
    on = np.ones((4, 5, 6), bool)
    moved, valid, truth, known = place(image, on, on, on, (8, 8, 8), np.eye(3), None, np.array([-9.0]))
    np.testing.assert_array_equal(moved[0, 2:6, 1:6, 1:7], image[0])
    assert valid.sum() == truth.sum() == known.sum() == on.size


def test_invalid_voxels_become_the_lowest_value():
    voxels = np.array([[[[INVALID, 100, 150]]]], np.int16)
    image, valid = normalised(voxels, NORM)
    np.testing.assert_allclose(image[0, 0, 0], [-2, 0, 1])
    assert valid[0, 0].tolist() == [False, True, True]


def test_other_geometries_axes_and_spacings_go_into_batches_of_their_own():
    crops = [
        crop(index=0),
        crop(index=1, axes=(1, 0, 2)),
        crop(index=2, spacing=(2.5, 1.0, 1.0)),
        crop(index=3),
    ]
    batch = collate()(0, 0, crops)
    assert sorted(len(w.index) for w in batch.windows) == [1, 1, 2]
    flat = collate(geometry="planar", window=(1, 30, 30))(0, 0, [crop(shape=(1, 20, 20))])
    assert flat.windows[0].image.shape == (1, 1, 1, 32, 32)


def test_another_number_of_channels_is_refused_by_name():
    with pytest.raises(UserError, match=r"head\.channels"):
        collate(channels=1)(0, 0, [crop(channels=2)])
