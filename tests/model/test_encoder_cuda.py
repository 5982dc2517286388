"""The same numbers on CPU and on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from model.config import EncoderConfig
from model.encoder import Encoder
from model.normalise import normalise
from model.patches import gather_patches, token_centres

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_from_stored_voxels_to_features() -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(size="nano", registers=2)).eval()
    voxels = torch.randint(-1000, 2000, (2, 30 * 40 * 20), dtype=torch.int16)
    grid, flip = (
        torch.tensor([[3, 4, 2], [2, 2, 2]]),
        torch.tensor([[True, False, False], [False, True, True]]),
    )
    extent, residual = torch.tensor([[30, 40, 20]] * 2), torch.tensor([[1.0, 1.0, 1.0], [1.3, 0.9, 1.0]])
    norm = torch.tensor(
        [[1.0, 0.0, -1024.0, 3071.0, -200.0, 500.0, 0.0], [0.01, 10.0, 0.0, 100.0, 1.0, 1.0, 1.0]]
    )
    results = []
    for device in ("cpu", "cuda"):
        moved = [t.to(device) for t in (voxels, extent, grid, residual, flip)]
        raw, inside = gather_patches(*moved, (8, 8, 8), 24)
        x = normalise(raw, norm.to(device), inside)
        ones = torch.ones(2, 3, device=device)
        axes = torch.tensor([[0, 1, 2]] * 2, device=device)
        centres = token_centres(moved[2], 0 * ones, ones, (8, 8, 8), axes, 24)
        encoder.to(device)
        with torch.no_grad():
            tokens = encoder.stem("volume", x).flatten(0, 1)
            attend = inside.any(2).flatten()
            (out,) = encoder.trunk(tokens, centres.flatten(0, 1), ((2, 24),), attend)
        results.append([t.cpu() for t in (raw, inside, x, centres, out)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
