"""Photos that the processes of a comparison share: the same as without, made once."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from shared_photos import share

from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data import ImageConfig, batches, build_transform, loader
from s2a_cli.data.images import ImageFiles

IMAGE = ImageConfig(size=8, mean=(0.5,) * 3, std=(0.2,) * 3, interpolation="bicubic", crop_pct=0.9)


def seen(split, train: bool, seed: int, epoch: int) -> list[torch.Tensor]:
    transform = build_transform(IMAGE, DatasetConfig(name="folder"), train, normalise=False)
    found = loader(split, transform, 4, seed=seed, epoch=epoch, train=train, workers=0)
    return [tensor for batch in found for tensor in batch]


def test_photos_are_those_of_any_other_run_and_made_once(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    files = [f"{i}.png" for i in range(9)]
    for i, file in enumerate(files):
        pixels = np.random.default_rng(i).integers(0, 255, (12, 15, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / file)
    split = ImageFiles(tmp_path / "photos", files, [i % 2 for i in range(9)])
    cases = [(True, 0, 0), (True, 0, 1), (True, 1, 0), (False, 0, 0)]
    plain = [seen(split, *case) for case in cases]
    monkeypatch.setattr(batches, "_Samples", batches._Samples)
    (tmp_path / "shared").mkdir()
    share(tmp_path / "shared")
    for again in (False, True):
        if again:
            shutil.rmtree(tmp_path / "photos")
        for case, expected in zip(cases, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(seen(split, *case), expected, strict=True))
    with pytest.raises(UserError, match="is not a readable image"):
        seen(split, True, 2, 0)
