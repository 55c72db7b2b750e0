from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import folder_config, picture, save, tree
from PIL import Image
from torchvision.transforms import v2

from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data import ImageConfig, Loader, build_transform, load, loader, normalised
from s2a_cli.data.images import ImageArray, ImageFiles

IMAGE = ImageConfig(size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic", crop_pct=0.9)


@pytest.fixture
def split(tmp_path) -> ImageFiles:
    return load(folder_config(tree(tmp_path / "photos", images=14))).train  # 18 images


def batches(split, train: bool = True, epoch: int = 0, **settings) -> list[tuple[torch.Tensor, torch.Tensor]]:
    transform = build_transform(IMAGE, DatasetConfig(name="folder"), train)
    return list(loader(split, transform, 4, epoch=epoch, train=train, **settings))


def same(ours, theirs) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def test_batches_do_not_depend_on_the_number_of_workers(split):
    transform = build_transform(IMAGE, DatasetConfig(name="folder"), True)
    alone = loader(split, transform, 4, seed=3, train=True, workers=0)
    crowd = loader(split, transform, 4, seed=3, train=True, workers=2)
    seen = []
    for epoch in (0, 1, 5):  # the same workers over several epochs, and after a pass that is left early
        alone.epoch = crowd.epoch = epoch
        ours, theirs = list(alone), list(crowd)
        assert same(ours, theirs)
        next(iter(crowd))
        seen.append(ours)
    assert not same(seen[0], seen[1]) and not same(seen[1], seen[2])
    assert same(seen[1], batches(split, epoch=1, seed=3))
    assert not same(seen[1], batches(split, epoch=1, seed=4))


def test_an_augmentation_depends_on_seed_epoch_and_index_alone(split):
    def augmented(order: list[int]) -> dict[int, torch.Tensor]:
        part = split.subset(range(len(split)))
        found = loader(part, build_transform(IMAGE, DatasetConfig(name="folder"), True), 1, seed=1, epoch=2, workers=0)
        return {index: found._loader.dataset[2, index][0] for index in order}

    forwards, backwards = augmented(list(range(6))), augmented(list(range(6))[::-1])
    assert all(torch.equal(forwards[index], backwards[index]) for index in forwards)


def test_every_image_is_seen_once_an_epoch(split):
    labels = torch.cat([labels for _, labels in batches(split, seed=1)])
    assert sorted(labels.tolist()) == sorted(split.labels) and labels.tolist() != split.labels
    ordered = torch.cat([labels for _, labels in batches(split, train=False)])
    assert ordered.tolist() == split.labels and ordered.dtype == torch.int64


def test_evaluation_is_the_same_in_every_epoch(split):
    assert same(batches(split, train=False, epoch=0, seed=0), batches(split, train=False, epoch=3, seed=9))


def test_the_global_generator_is_left_alone(split):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        batches(split, workers=workers)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("images", "batch", "sizes"), [(9, 4, [4, 4]), (10, 4, [4, 4, 2]), (8, 4, [4, 4]), (1, 4, [1]), (3, 1, [1, 1, 1])]
)
def test_a_last_batch_of_one_image_is_left_out_of_training(images, batch, sizes):
    if batch == 1:
        sizes = [1, 1, 1]
    split = ImageArray(np.zeros((images, 8, 8, 3), np.uint8), [0] * images)
    transform = build_transform(IMAGE, DatasetConfig(name="digits"), False)
    training = loader(split, transform, batch, train=True)
    assert [len(labels) for _, labels in training] == sizes and len(training) == len(sizes)
    evaluation = loader(split, transform, batch)
    assert sum(len(labels) for _, labels in evaluation) == images and len(evaluation) == math.ceil(images / batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_in_one_line(split, workers):
    Path(split.name(5)).write_bytes(b"damaged")
    with pytest.raises(UserError) as error:
        batches(split, workers=workers)
    assert str(error.value).startswith(f"{split.name(5)} is not a readable image") and "\n" not in str(error.value)


def test_bad_batch_size(split):
    with pytest.raises(UserError, match="batch size 0"):
        loader(split, build_transform(IMAGE, DatasetConfig(), False), 0)


def test_images_in_memory_need_no_workers():
    split = ImageArray(np.zeros((4, 8, 8, 3), np.uint8), [0] * 4)
    found = loader(split, build_transform(IMAGE, DatasetConfig(name="digits"), False), 2)
    assert isinstance(found, Loader) and found._loader.num_workers == 0


# transforms


def test_evaluation_is_resize_crop_normalise():
    picture_ = picture(1, size=(40, 20))
    found = build_transform(IMAGE, DatasetConfig(name="digits"), train=False)(picture_)
    assert found.shape == (3, 8, 8) and found.dtype == torch.float32
    small = picture_.resize((16, 8), Image.Resampling.BICUBIC)  # the shorter side: floor(8 / 0.9)
    expected = torch.from_numpy(np.array(small.crop((4, 0, 12, 8)))).permute(2, 0, 1) / 255
    expected = (expected - torch.tensor(IMAGE.mean)[:, None, None]) / torch.tensor(IMAGE.std)[:, None, None]
    torch.testing.assert_close(found, expected)


def test_training_crops_and_flips():
    picture_ = picture(1, size=(40, 20))
    both = build_transform(IMAGE, DatasetConfig(name="digits"), train=True)
    torch.manual_seed(0)
    assert not torch.equal(both(picture_), both(picture_))
    neither = build_transform(IMAGE, DatasetConfig(name="digits", scale=None, hflip=0.0), train=True)
    evaluation = build_transform(IMAGE, DatasetConfig(name="digits"), train=False)
    assert torch.equal(neither(picture_), evaluation(picture_))
    always = build_transform(IMAGE, DatasetConfig(name="digits", scale=None, hflip=1.0), train=True)
    assert torch.equal(always(picture_), evaluation(picture_).flip(-1))


def test_tiny_images_are_enlarged():
    for train in (False, True):
        transform = build_transform(IMAGE, DatasetConfig(name="digits"), train)
        assert transform(picture(1, size=(3, 5))).shape == (3, 8, 8)


def test_of_a_line_of_pixels_the_middle_is_taken():
    for train in (False, True):
        transform = build_transform(IMAGE, DatasetConfig(), train=train)
        assert transform(Image.new("RGB", (1, 3_000_000))).shape == (3, 8, 8)
    striped = Image.new("RGB", (4, 400))
    striped.paste((255, 255, 255), (0, 150, 4, 250))
    middle = build_transform(IMAGE, DatasetConfig(), train=False, normalise=False)(striped)
    assert middle.min() == 255


def test_unknown_interpolation():
    image = ImageConfig(size=8, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubik", crop_pct=1.0)
    with pytest.raises(UserError, match="did you mean 'bicubic'"):
        build_transform(image, DatasetConfig(), train=False)


def test_what_a_transform_needs_of_an_image(tmp_path):
    whole = build_transform(IMAGE, DatasetConfig(scale=None, hflip=0.0), train=True)
    crops = build_transform(IMAGE, DatasetConfig(scale=[0.25, 1.0]), train=True)
    assert (whole.at_least, crops.at_least) == (16, 32)
    path = save(tmp_path / "photo.jpg", 4, size=(640, 480))
    split = ImageFiles(tmp_path, [path.name], [0])
    assert split.image(0, whole.at_least).size == (80, 60)
    close = (whole(split.image(0, whole.at_least)) - whole(split.image(0))).abs().mean()
    assert close < 0.03 and isinstance(whole.steps, v2.Compose)


@pytest.mark.parametrize("train", [True, False])
def test_pixels_are_normalised_to_the_bit_where_they_are_needed(train):
    found = []
    for normalise in (True, False):
        torch.manual_seed(0)
        found.append(build_transform(IMAGE, DatasetConfig(name="digits"), train, normalise)(picture(1, size=(40, 20))))
    expected, pixels = found
    assert pixels.dtype == torch.uint8 and expected.dtype == torch.float32
    assert torch.equal(normalised(pixels[None], IMAGE)[0], expected)
