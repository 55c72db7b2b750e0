"""Reads DomainNet (Peng et al., ICCV 2019), the cleaned version: 345 classes in six domains, with official lists."""

from __future__ import annotations

from pathlib import Path

from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data.download import RemoteFile, fetch, fetch_tree
from s2a_cli.data.images import ImageFiles
from s2a_cli.data.source import Source, revision_of

HOST = "csr.bu.edu/ftp/visda/2019/multi-source"
MIRROR = "https://huggingface.co/yashkant/evalmerge/resolve/main/domainnet"


def _file(name: str, bytes_: int, sha256: str, path: str = "") -> RemoteFile:
    urls = (f"https://{HOST}/{path}{name}", f"http://{HOST}/{path}{name}", f"{MIRROR}/{name}")
    return RemoteFile(name, bytes_, sha256, urls)


def _list(name: str, bytes_: int, sha256: str) -> RemoteFile:
    return _file(name, bytes_, sha256, "domainnet/txt/")


# domain: images, training list, test list. groundtruth/ has the cleaned archives of the two domains that needed it.
FILES = {
    "clipart": (
        _file(
            "clipart.zip",
            1_270_909_081,
            "f8f248a3e8bbc9868c523ae24e6601b4c2ad102afc60c0efeb4f3255df22354d",
            "groundtruth/",
        ),
        _list("clipart_train.txt", 1_443_819, "affdadf5f95a7583e6b98030a3d35007e2613ee4dd942393c5a705ec2b429312"),
        _list("clipart_test.txt", 628_917, "62c8e36aaba1c41ad9e249099739707220a44c08f167b37ef420f34a31628a6b"),
    ),
    "infograph": (
        _file("infograph.zip", 4_338_659_804, "891e14f476317e97b6f06d6498c11d0a5b8d0c8b57210765ed9beb072da611fa"),
        _list("infograph_train.txt", 1_683_098, "36b44cbd41a2915e0dc73b4f4be8862a6f3c220f93c8d63fb2439beeae3aefda"),
        _list("infograph_test.txt", 728_028, "413cfa54ac92e7e6b242f4f09fbd9c8ace85c4deaf3cb6c81ff6b68264460136"),
    ),
    "painting": (
        _file(
            "painting.zip",
            3_679_366_174,
            "fa47e6d405503ea0286cabd767f176bd30e988b63ddd7b9db16cf030c9770015",
            "groundtruth/",
        ),
        _list("painting_train.txt", 2_241_901, "f1da38d50a702fddf1329f85bc607d7a2abcae7e6aec75e1fd49cc1bd340d47b"),
        _list("painting_test.txt", 971_888, "11472b13b5188e09f06918b12eebb660588c97a20e43e268d9b02e3e37eb8f97"),
    ),
    "quickdraw": (
        _file("quickdraw.zip", 459_920_701, "9f37df2a8c3733703dbb35ad9964202a65f675ca30137756457537536b485d84"),
        _list("quickdraw_train.txt", 5_164_600, "3a5edd3bc215772010eebc87f158707703dd7e48091d13b816af81326a9d1c0f"),
        _list("quickdraw_test.txt", 2_213_400, "2a00a60650a453c65c356da748fec54084a197272137c440e7d52d08947357bf"),
    ),
    "real": (
        _file("real.zip", 6_062_039_589, "d7fe010b430c5b510f85d657d38c4a1924822695fabea4fef57bd00dba251d63"),
        _list("real_train.txt", 4_440_944, "19d483256d24aef19e581b65eda8333fd918aef3eb733fe499ff384120e3a289"),
        _list("real_test.txt", 1_911_327, "2b3f75bcde309aeb5931292084b2162e936b5f189e3bb1ad716f0f74c460864c"),
    ),
    "sketch": (
        _file("sketch.zip", 2_633_992_926, "23a7dbae7016b343e934399beaa8a68728fb5e570ebe2c71df9b75cf91c499fc"),
        _list("sketch_train.txt", 1_960_222, "72f4bc6afa5702a1ccba800d0053c1427de87439dfaf246dbc9a2e71abfec54f"),
        _list("sketch_test.txt", 850_581, "3fb48fca18c507c4321f007c3f62b308ec232ff6928cbfe2af64e76ec366e840"),
    ),
}


def read(config: DatasetConfig, folder: Path) -> Source:
    """Returns training images of `config.domain` and test images of `config.test_domain` (null: of the same domain).

    Labels agree across domains.
    """
    assert config.domain is not None, "data.problems asks for it"
    images, train_list, _ = FILES[config.domain]
    test_images, _, test_list = FILES[config.test_domain or config.domain]
    names: dict[int, str] = {}

    def split(archive: RemoteFile, lines: RemoteFile) -> ImageFiles:
        files, labels = [], []
        for line in fetch(lines, folder, config.download).read_text().splitlines():
            file, label = line.rsplit(" ", 1)  # clipart/aircraft_carrier/clipart_001_000001.jpg 0
            files.append(file)
            labels.append(int(label))
            names[labels[-1]] = file.split("/")[1]
        return ImageFiles(fetch_tree(archive, folder, config.download), files, labels)

    train, test = split(images, train_list), split(test_images, test_list)
    # the domains share the numbers of classes, so a number without an image keeps its place
    classes = [names.get(label, f"class {label}") for label in range(max(names) + 1)]
    return Source(train, None, test, classes, revision_of(images, train_list, test_images, test_list))
