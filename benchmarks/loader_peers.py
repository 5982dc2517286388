"""Other people's loaders on the volumes of `loader.py`: files in their own formats, batches from processes.

Each function writes what its loader reads and returns a function that opens it with a number of worker
processes; the opened loader yields batches of `batch` crops. Each is set up as its users set it up, in its
fastest common way, without augmentation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
import webdataset as wds

Opened = Iterator[Any]
Opener = Callable[[int], Opened]
REPEATS = 200  # of the list of volumes in an epoch, so that no loader starts its workers again while timed


def nnunet(
    folder: Path, arrays: Sequence[np.ndarray], crop: int, batch: int, dtype: type
) -> tuple[Opener, str, Callable[[], Any]]:
    """`nnUNetDatasetBlosc2` in nnU-Net's blocks, `nnUNetDataLoader` in its `NonDetMultiThreadedAugmenter`.

    Labels, which it always reads, are all 0, and so cost it least. Returns the opener, its blocks in words,
    and a function that reads one crop.
    """
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(name, str(folder))  # or it warns
    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    place = folder / f"nnunet-{np.dtype(dtype)}"
    place.mkdir()
    for number, array in enumerate(arrays):
        data: np.ndarray = array.astype(dtype)
        seg = np.zeros(array.shape, np.int8)
        if np.issubdtype(dtype, np.floating):
            data = (data - data.mean()) / data.std()
        params = nnUNetDatasetBlosc2.comp_blosc2_params
        blocks, chunks = params(data.shape, (crop,) * 3, data.itemsize)
        seg_blocks, seg_chunks = params(seg.shape, (crop,) * 3, seg.itemsize)
        nnUNetDatasetBlosc2.save_case(
            data, seg, {"class_locations": {}}, str(place / f"case{number}"),
            chunks=chunks, blocks=blocks, chunks_seg=seg_chunks, blocks_seg=seg_blocks,
        )  # fmt: skip

    def loader(size: int) -> Any:
        labels = LabelManager({"background": 0, "class": 1}, None)
        return nnUNetDataLoader(nnUNetDatasetBlosc2(str(place)), size, (crop,) * 3, (crop,) * 3, labels)

    def opened(workers: int) -> Opened:
        augmenter = NonDetMultiThreadedAugmenter(
            loader(batch), None, workers, num_cached=max(6, workers // 2), wait_time=0.002
        )
        try:
            yield from augmenter
        finally:
            augmenter._finish()

    one = loader(1)
    g = np.random.default_rng(0)
    origins = g.integers(0, np.array(arrays[0].shape[1:]) - crop + 1, (300, 3))
    block = np.array(blocks[1:])
    touched = (origins + crop - 1) // block - origins // block + 1
    over = float((touched * block).prod(axis=1).mean()) / crop**3
    shape = "×".join(map(str, blocks[1:]))
    return opened, f"blocks of {shape}, {over:.2f} voxels decompressed a voxel used", one.generate_train_batch


def monai(
    folder: Path, niftis: Sequence[Path], crop: int, batch: int
) -> tuple[Opener, str, Callable[[], Any]]:
    """`PersistentDataset` (whole volumes cached as int16 tensors), `RandSpatialCropd`, torch's DataLoader."""
    from monai.data import PersistentDataset
    from monai.transforms import Compose, EnsureTyped, LoadImaged, RandSpatialCropd

    steps = Compose(
        [
            LoadImaged("image", image_only=True, ensure_channel_first=True, dtype=np.int16),
            EnsureTyped("image", track_meta=False, dtype=torch.int16),
            RandSpatialCropd("image", (crop,) * 3, random_size=False),
        ]
    )
    items = [{"image": str(path)} for path in niftis] * REPEATS
    dataset = PersistentDataset(items, steps, cache_dir=folder / "monai")
    for number in range(len(niftis)):
        dataset[number]
    return partial(_loaded, dataset, batch, True), "torch.load of the cached volume", lambda: dataset[0]


def torchio(
    niftis: Sequence[Path], crop: int, batch: int, per_volume: int
) -> tuple[Opener, str, Callable[[], Any]]:
    """`Queue` over uncompressed NIfTI with a `UniformSampler`, its workers loading whole subjects."""
    import torchio as tio

    subjects = tio.SubjectsDataset([tio.Subject(image=tio.ScalarImage(path)) for path in niftis] * REPEATS)

    def opened(workers: int) -> Opened:
        queue = tio.Queue(
            subjects,
            max_length=4 * batch * per_volume,
            samples_per_volume=per_volume,
            sampler=tio.data.UniformSampler(crop),
            num_workers=workers,
        )
        yield from tio.SubjectsLoader(queue, batch_size=batch, num_workers=0)

    return opened, "reading the volume as float32", lambda: subjects[0].load()


def webdataset(root: Path, crop: int, batch: int) -> tuple[Opener, str, Callable[[], Any]]:
    """Plain `wds.WebDataset` on the same shards: every volume is decoded whole, then cropped."""
    tars = sorted(str(path) for path in root.glob("train-*.tar"))
    dataset = wds.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False)
    dataset = dataset.repeat().map(partial(_decode_and_cut, crop))
    frame = next(iter(wds.WebDataset(tars, shardshuffle=False)))["b2nd"]
    return partial(_loaded, dataset, batch, None), "Blosc2 decoding of the volume", lambda: _decode(frame)


def _loaded(dataset: Any, batch: int, shuffle: bool | None, workers: int) -> Opened:
    loader: Any = torch.utils.data.DataLoader(
        dataset, batch, shuffle=shuffle, num_workers=workers, persistent_workers=True
    )
    while True:
        yield from loader


def _decode(frame: bytes) -> np.ndarray:
    return np.asarray(blosc2.ndarray_from_cframe(frame)[:])


def _decode_and_cut(crop: int, sample: dict[str, Any]) -> torch.Tensor:
    voxels = _decode(sample["b2nd"])
    z, y, x = (int(torch.randint(n - crop + 1, ())) for n in voxels.shape[1:])
    return torch.from_numpy(voxels[0, z : z + crop, y : y + crop, x : x + crop].copy())
