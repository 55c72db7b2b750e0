"""Reads Oxford's Flowers-102 (Nilsback and Zisserman, 2008) and Oxford-IIIT Pet (Parkhi et al., 2012)."""

from __future__ import annotations

from pathlib import Path

from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data.download import RemoteFile, fetch, fetch_tree
from s2a_cli.data.images import ImageFiles
from s2a_cli.data.source import Source, revision_of

FLOWERS_HOSTS = (
    "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    "https://thor.robots.ox.ac.uk/flowers/102/",
    "https://paddlemodels.bj.bcebos.com/flowers/",
)
PETS_HOSTS = ("https://www.robots.ox.ac.uk/~vgg/data/pets/data/", "https://thor.robots.ox.ac.uk/~vgg/data/pets/")


def _file(name: str, bytes_: int, sha256: str, hosts: tuple[str, ...]) -> RemoteFile:
    return RemoteFile(name, bytes_, sha256, tuple(host + name for host in hosts))


FLOWERS = _file(
    "102flowers.tgz",
    344_862_509,
    "2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246",  # MD5 52808999861908f626f3c1f4e79d11fa
    FLOWERS_HOSTS,
)
FLOWER_LABELS = _file(
    "imagelabels.mat",
    502,
    "4903e94206bac23bf772aadf06451916df56b58fc483a62db32a97b82656651d",  # MD5 e0620be6f572b9609742df49c70aed4d
    FLOWERS_HOSTS,
)
FLOWER_SPLITS = _file(
    "setid.mat",
    14_989,
    "46b8678f91fd95d3c8f4feab80d271a6c834a1dd896fe29fd3e6ad9ce5c8dccd",  # MD5 a5357ecc9cb78c4bef273ce3793fc85c
    FLOWERS_HOSTS,
)
PETS = _file(
    "images.tar.gz",
    791_918_971,
    "67195c5e1c01f1ab5f9b6a5d22b8c27a580d896ece458917e61d459337fa318d",  # MD5 5c4f3ee8e5d25df40f4fd59a7f44e54c
    PETS_HOSTS,
)
PET_LISTS = _file(
    "annotations.tar.gz",
    19_173_078,
    "52425fb6de5c424942b7626b428656fcbd798db970a937df61750c0f1d358e91",  # MD5 95a8c909bbe2e81eed6a22bccdf3f68f
    PETS_HOSTS,
)


def read_flowers102(config: DatasetConfig, folder: Path) -> Source:
    """Returns the official splits: 10 training and 10 validation images a class, and 6,149 test images."""
    from scipy.io import loadmat

    label_of = loadmat(fetch(FLOWER_LABELS, folder, config.download))["labels"].ravel().astype(int)
    ids = loadmat(fetch(FLOWER_SPLITS, folder, config.download))
    tree = fetch_tree(FLOWERS, folder, config.download)

    def split(key: str) -> ImageFiles:
        numbers = ids[key].ravel().astype(int).tolist()  # images and classes are counted from 1
        labels = [int(label_of[number - 1]) - 1 for number in numbers]
        return ImageFiles(tree, [f"jpg/image_{number:05d}.jpg" for number in numbers], labels)

    revision = revision_of(FLOWERS, FLOWER_LABELS, FLOWER_SPLITS)
    return Source(split("trnid"), split("valid"), split("tstid"), " ".join(FLOWER_NAMES.split()).split(", "), revision)


def read_pets(config: DatasetConfig, folder: Path) -> Source:
    """Returns the official lists of 37 breeds: trainval.txt, from which validation is split off, and test.txt."""
    lists = fetch_tree(PET_LISTS, folder, config.download) / "annotations"
    tree = fetch_tree(PETS, folder, config.download)
    names: dict[int, str] = {}

    def split(file: str) -> ImageFiles:
        files, labels = [], []
        for line in (lists / file).read_text().splitlines():
            name, breed, _species, _number = line.split()  # Abyssinian_100 1 1 1
            files.append(f"images/{name}.jpg")
            labels.append(int(breed) - 1)
            names[labels[-1]] = name.rpartition("_")[0]
        return ImageFiles(tree, files, labels)

    train, test = split("trainval.txt"), split("test.txt")
    return Source(train, None, test, [names[label] for label in sorted(names)], revision_of(PETS, PET_LISTS))


# Classes 1 to 102, as on the data set's page
FLOWER_NAMES: str = """
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid,
bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris,
globe-flower, purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily, pincushion flower,
fritillary, red ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet
william, carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya, cape
flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil, sword lily, poinsettia, bolero deep
blue, wallflower, marigold, buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower,
pelargonium, bishop of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia, cautleya spicata, japanese
anemone, black-eyed susan, silverbush, californian poppy, osteospermum, spring crocus, bearded iris, windflower,
tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower, lotus, toad lily,
anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress,
canna lily, hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia, mallow, mexican petunia, bromelia,
blanket flower, trumpet creeper, blackberry lily
"""
