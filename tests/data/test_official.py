"""The readers of published data sets, on tiny archives laid out exactly as the official ones are."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import picture
from scipy.io import savemat

from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data import load
from s2a_cli.data.sources import cifar, domainnet, oxford


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "data"


def install(monkeypatch, module, name: str, path: Path, content: bytes) -> None:
    """Puts a file where the user would, and makes it the expected one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    file = replace(getattr(module, name), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    assert path.name == file.name
    monkeypatch.setattr(module, name, file)


def tgz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def offline(name: str, root: Path, **settings) -> DatasetConfig:
    return DatasetConfig(name=name, root=str(root), download=False, **settings)


def colour(split, index: int) -> tuple:
    image, _ = split[index]
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def cifar_record(labels: list[int], red: int, green: int, blue: int) -> bytes:
    planes = np.repeat(np.array([red, green, blue], np.uint8), 1024)
    planes[0], planes[1] = 200, 100  # the first two pixels of the red plane's first row
    return bytes(labels) + planes.tobytes()


def test_cifar10(root, monkeypatch):
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    files = {"cifar-10-batches-bin/batches.meta.txt": "\n".join(names).encode() + b"\n\n"}
    for batch in range(1, 6):
        files[f"cifar-10-batches-bin/data_batch_{batch}.bin"] = b"".join(
            cifar_record([label], batch, label, 30) for label in range(10)
        )
    files["cifar-10-batches-bin/test_batch.bin"] = cifar_record([7], 1, 2, 3)
    files["cifar-10-batches-bin/readme.html"] = b"<html></html>"
    install(monkeypatch, cifar, "CIFAR10", root / "cifar10/cifar-10-binary.tar.gz", tgz(files))
    splits = load(offline("cifar10", root))
    assert splits.classes == names and splits.name == "cifar10"
    assert (len(splits.train), len(splits.val), len(splits.test)) == (40, 10, 1)
    assert sorted(splits.val.labels) == list(range(10))
    assert splits.test.labels == [7]
    image, label = splits.test[0]
    assert image.size == (32, 32) and label == 7
    # planes are red, green, blue; each goes row by row
    assert [image.getpixel(at) for at in ((0, 0), (1, 0), (0, 1))] == [(200, 2, 3), (100, 2, 3), (1, 2, 3)]


def test_cifar100_takes_the_fine_labels(root, monkeypatch):
    fine = [f"fine{label:02d}" for label in range(100)]
    files = {
        "cifar-100-binary/coarse_label_names.txt": b"aquatic_mammals\n",
        "cifar-100-binary/fine_label_names.txt": "\n".join(fine).encode() + b"\n",
        "cifar-100-binary/train.bin": b"".join(cifar_record([3, label], 1, 2, 3) for label in range(100)) * 2,
        "cifar-100-binary/test.bin": cifar_record([19, 42], 4, 5, 6),
    }
    install(monkeypatch, cifar, "CIFAR100", root / "cifar100/cifar-100-binary.tar.gz", tgz(files))
    splits = load(offline("cifar100", root, val_fraction=0.5))
    assert splits.classes == fine
    assert sorted(splits.train.labels) == sorted(splits.val.labels) == list(range(100))
    assert splits.test.labels == [42] and splits.test[0][0].getpixel((5, 5)) == (4, 5, 6)


def test_a_cifar_file_of_a_wrong_length_is_named(root, monkeypatch):
    files = {"cifar-100-binary/train.bin": bytes(3075), "cifar-100-binary/fine_label_names.txt": b"a"}
    install(monkeypatch, cifar, "CIFAR100", root / "cifar100/cifar-100-binary.tar.gz", tgz(files))
    with pytest.raises(UserError, match=r"train.bin has 3075 bytes"):
        load(offline("cifar100", root))


def matlab(**arrays) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, arrays)
    return buffer.getvalue()


def test_flowers102_has_the_official_splits(root, monkeypatch):
    folder = root / "flowers102"
    images = {f"jpg/image_{number:05d}.jpg": jpeg(number) for number in range(1, 7)}
    install(monkeypatch, oxford, "FLOWERS", folder / "102flowers.tgz", tgz(images))
    labels = matlab(labels=np.array([[77, 77, 102, 102, 1, 1]], np.uint8))
    install(monkeypatch, oxford, "FLOWER_LABELS", folder / "imagelabels.mat", labels)
    ids = matlab(
        trnid=np.array([[6, 1, 4]], np.uint16), valid=np.array([[2]], np.uint16), tstid=np.array([[3, 5]], np.uint16)
    )
    install(monkeypatch, oxford, "FLOWER_SPLITS", folder / "setid.mat", ids)
    splits = load(offline("flowers102", root))
    assert [splits.train.labels, splits.val.labels, splits.test.labels] == [[0, 76, 101], [76], [101, 0]]
    assert splits.train.name(0).endswith("jpg/image_00006.jpg")
    expected = picture(6)
    assert np.abs(np.asarray(splits.train[0][0], int) - np.asarray(expected, int)).mean() < 20  # JPEG's own error
    assert len(splits.classes) == 102
    assert [splits.classes[label] for label in (0, 15, 76, 101)] == [
        "pink primrose", "globe-flower", "passion flower", "blackberry lily"
    ]  # fmt: skip


def test_pets_are_classified_by_breed(root, monkeypatch):
    breeds = ["Abyssinian", "american_bulldog", "great_pyrenees"]
    images = {f"images/{breed}_{number}.jpg": jpeg(number) for breed in breeds for number in range(1, 9)}
    images["images/Abyssinian_100.mat"] = b"a stray file, as in the official archive"
    lists = {"annotations/trainval.txt": "", "annotations/test.txt": "", "annotations/list.txt": "# image class\n"}
    for breed_id, breed in enumerate(breeds, 1):
        for number in range(1, 9):
            name = "trainval" if number <= 5 else "test"
            lists[f"annotations/{name}.txt"] += f"{breed}_{number} {breed_id} {2 if breed[0].islower() else 1} 1\n"
    files = {name: text.encode() for name, text in lists.items()}
    install(monkeypatch, oxford, "PETS", root / "pets/images.tar.gz", tgz(images))
    install(monkeypatch, oxford, "PET_LISTS", root / "pets/annotations.tar.gz", tgz(files))
    splits = load(offline("pets", root))
    assert splits.classes == breeds
    assert splits.test.labels == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert sorted(splits.val.labels) == [0, 1, 2] and len(splits.train) == 12
    assert Path(splits.test.name(3)).name == "american_bulldog_6.jpg"
    assert splits.test[3][0].mode == "RGB"


@pytest.fixture
def domains(root, monkeypatch) -> Path:
    classes = ["aircraft_carrier", "airplane", "alarm_clock"]
    replaced = dict(domainnet.FILES)
    for domain in ("clipart", "real"):
        buffer, lists = io.BytesIO(), {"train": "", "test": ""}
        with zipfile.ZipFile(buffer, "w") as archive:
            for label, name in enumerate(classes):
                if (domain, label) == ("clipart", 1):
                    continue  # a class without an image in one domain keeps its number
                for number in range(1, 6):
                    file = f"{domain}/{name}/{domain}_{label + 1:03d}_{number:06d}.jpg"
                    archive.writestr(file, jpeg(10 * label + number))
                    lists["train" if number <= 4 else "test"] += f"{file} {label}\n"
        contents = [buffer.getvalue(), lists["train"].encode(), lists["test"].encode()]
        new = []
        for file, content in zip(domainnet.FILES[domain], contents, strict=True):
            (root / "domainnet").mkdir(parents=True, exist_ok=True)
            (root / "domainnet" / file.name).write_bytes(content)
            new.append(replace(file, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
        replaced[domain] = tuple(new)
    monkeypatch.setattr(domainnet, "FILES", replaced)
    return root


def test_domainnet_within_a_domain(domains):
    splits = load(offline("domainnet", domains, domain="real"))
    assert splits.name == "domainnet-real" and splits.classes == ["aircraft_carrier", "airplane", "alarm_clock"]
    assert (len(splits.train), len(splits.val), splits.test.labels) == (9, 3, [0, 1, 2])
    assert splits.test.name(1).endswith("real/airplane/real_002_000005.jpg")
    assert splits.test[1][0].size == (12, 10)


def test_domainnet_across_domains(domains):
    splits = load(offline("domainnet", domains, domain="clipart", test_domain="real"))
    assert splits.name == "domainnet-clipart-to-real"
    assert set(splits.train.labels) == {0, 2} and splits.test.labels == [0, 1, 2]
    assert "clipart/" in splits.train.name(0) and "real/" in splits.test.name(0)
    alone = load(offline("domainnet", domains, domain="clipart"))
    assert alone.classes == ["aircraft_carrier", "class 1", "alarm_clock"]
    assert alone.revision != splits.revision


def test_a_missing_data_set_says_which_file_to_put_where(root):
    settings = {"domainnet": {"domain": "sketch"}}
    for name in (*cifar.READERS, *oxford.READERS, *domainnet.READERS):
        with pytest.raises(UserError, match=r"Put .* into .*, from http") as error:
            load(offline(name, root, **settings.get(name, {})))
        assert str(root / name) in str(error.value)


def test_remote_files_are_well_formed():
    files = [cifar.CIFAR10, cifar.CIFAR100, oxford.FLOWERS, oxford.FLOWER_LABELS, oxford.FLOWER_SPLITS, oxford.PETS]
    files += [oxford.PET_LISTS, *(file for of_domain in domainnet.FILES.values() for file in of_domain)]
    assert len({file.sha256 for file in files}) == len(files) == 25
    for file in files:
        assert len(bytes.fromhex(file.sha256)) == 32 and len(file.urls) >= 2
        assert all(url.endswith(f"/{file.name}") for url in file.urls)


def test_digits():
    splits = load(DatasetConfig(name="digits", val_fraction=0.25))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1076, 362, 359)
    for split in (splits.train, splits.val, splits.test):
        assert np.bincount(split.labels).min() >= len(split) / 11  # stratified
    image, label = splits.train[0]
    pixels = np.asarray(image)
    assert image.size == (8, 8) and image.mode == "RGB"
    assert max(np.asarray(splits.train[index][0]).max() for index in range(20)) == 255
    assert (pixels[..., 0] == pixels[..., 2]).all() and splits.classes[label] == str(label)
    assert splits.revision == "a19cb3d96bba"  # the same data with every version of scikit-learn
