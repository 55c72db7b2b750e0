"""Every data set that is there without a download, through one common tester."""

from __future__ import annotations

import numpy as np
import pytest

from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.data import DATASETS, load


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_is_as_it_should_be(name, tmp_path, monkeypatch):
    monkeypatch.setenv("S2A_DATA", str(tmp_path))
    config = compose([f"dataset={name}", "dataset.download=false"] + ["dataset.root=none"] * (name == "folder")).dataset
    try:
        one, two = load(config), load(config)
    except UserError:
        pytest.skip("is not there without a download")
    assert one.revision == two.revision and len(one.classes) == len(set(one.classes)) > 1
    pixels = {}
    for split in ("train", "val", "test"):
        images, again = getattr(one, split), getattr(two, split)
        assert images.labels == again.labels and set(images.labels) == set(range(len(one.classes)))
        for index in range(0, len(images), max(1, len(images) // 50)):
            image, label = images[index]
            assert image.mode == "RGB" and label == images.labels[index]
            assert np.array_equal(image, again[index][0])
            pixels.setdefault(np.asarray(image).tobytes(), set()).add(split)
    assert all(len(splits) == 1 for splits in pixels.values()), "an image lies in two splits"
