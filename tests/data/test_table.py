"""Tables of paths and labels: what is found in them, several labels an image, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from pictures import save
from refusals import refusal

from s2a_cli.config.schema import DatasetConfig
from s2a_cli.data import ImageConfig, build_transform, describe, load, loader
from s2a_cli.data.columns import count_classes
from s2a_cli.planner.run_memory import sizes


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twelve images in one folder: 00.png to 11.png."""
    for index in range(12):
        save(tmp_path / "photos" / f"{index:02}.png", index)
    return tmp_path / "photos"


def config(file: Path, **settings) -> DatasetConfig:
    return DatasetConfig(name="table", file=str(file), **settings)


def table(photos: Path, columns: dict, name: str = "labels.csv", **options) -> Path:
    frame = pd.DataFrame({"path": [f"{index:02}.png" for index in range(12)]} | columns)
    frame.to_csv(photos / name, index=False, **options)
    return photos / name


def everything(splits) -> dict[str, object]:
    """{name of an image: its labels, by name}, over all splits."""
    found = {}
    for split in (splits.train, splits.val, splits.test):
        for index, label in enumerate(split.labels):
            several = label if isinstance(label, tuple) else (label,)
            found[Path(split.name(index)).name] = tuple(splits.classes[one] for one in several)
    return found


SPECIES = ["owl", "jay"] * 6


def test_columns_are_found_by_their_names_and_what_is_in_them(photos):
    # classes that look like numbers keep their zeros, and are sorted by value
    numbers = ["10", "9"] * 6
    for columns, labels in (
        ({"Species": SPECIES}, SPECIES),
        ({"size": range(12), "class_name": SPECIES}, SPECIES),
        ({"whatever": numbers}, numbers),
        ({"owl": [1, 0] * 6, "jay": [0, 1] * 6}, SPECIES),
    ):
        splits = load(config(table(photos, columns)))
        assert everything(splits) == {f"{index:02}.png": (label,) for index, label in enumerate(labels)}
        assert not splits.multi_label and splits.name == "photos-labels"
    assert load(config(table(photos, {"n": numbers}))).classes == ["9", "10"]
    assert "labels.csv: images 'path', labels 'n'" in describe(load(config(photos / "labels.csv")))


def test_the_split_column_is_kept_and_what_has_none_is_left_out(photos):
    split = ["Train"] * 6 + ["valid"] * 2 + ["testing"] * 3 + [""]
    splits = load(config(table(photos, {"label": SPECIES, "split": split})))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [6, 2, 3]
    assert splits.left_out == ["1 image without a split in column 'split'"]
    odd = table(photos, {"label": SPECIES, "part": [*split[:-1], "maybe"]})
    assert "line 13 has 'maybe'; expected train, val or test" in refusal(load, config(odd, split_column="part"))


def test_a_split_column_with_a_wrong_cell_is_not_passed_over(photos):
    """A random split in its place would train on images that it keeps for the test."""
    split = ["train"] * 7 + ["val"] * 2 + ["test", "tets", "test"]
    wrong = table(photos, {"label": SPECIES, "split": split})
    assert "dataset.split_column=split: line 12 has 'tets'; expected train, val or test" in refusal(load, config(wrong))
    few = table(photos, {"label": SPECIES, "subset": ["dev"] * 11 + ["test"]})
    assert "line 2 has 'dev'" in refusal(load, config(few))
    for name, cells in (
        ("split", ["train_set", "test_set"]),
        ("set", ["train_set", "test_set"]),
        ("Split", ["0", "1"]),
    ):
        said = refusal(load, config(table(photos, {"label": SPECIES, name: cells * 6})))
        assert f"dataset.split_column={name}: line 2 has {cells[0]!r}; expected train, val or test, or another" in said
    two = table(photos, {"label": SPECIES, "split": ["train", "test"] * 6, "set": ["train", "test"] * 6})
    assert "several columns of splits: split, set; say which: dataset.split_column=" in refusal(load, config(two))
    other = load(config(table(photos, {"label": SPECIES, "set": ["Base Set", "Train Wagons"] * 6})))
    assert len(other.test) == 2, "a column of that name that is about something else"
    assert "labels 'label', not used 'set'" in describe(other)
    as_labels = load(config(table(photos, {"split": SPECIES}), label_column="split"))
    assert as_labels.classes == ["jay", "owl"] and len(as_labels.test) == 2
    folds = {"split": ["0", "1"] * 6, "set": ["train", "test"] * 6}
    assert len(load(config(table(photos, {"label": SPECIES} | folds))).test) == 6


def test_several_labels_an_image(photos):
    tags = ["owl;night", "jay", "owl", "", "jay;night", "owl"] * 2
    expected = {f"{index:02}.png": tuple(sorted(filter(None, of.split(";")))) for index, of in enumerate(tags)}
    file = table(photos, {"tags": tags})
    assert """'owl;night': for several labels an image, say 'dataset.separator=";"';""" in refusal(load, config(file))
    separated = load(config(file, separator=";"))
    assert separated.multi_label and everything(separated) == expected
    assert separated.classes == ["jay", "night", "owl"] and separated.test.counts(3).sum() > 0
    assert "several labels an image: 1.17 on average, 2 at most, 2 images without any" in describe(separated)
    one = {"tags": [str(of.split(";")) if of else "[]" for of in tags]}  # as pandas writes lists
    columns = {name: [int(name in of) for of in tags] for name in ("jay", "night", "owl")}
    lines = pd.DataFrame(
        [(file, label) for file, of in expected.items() for label in of or ("",)], columns=["path", "label"]
    )
    lines.to_csv(photos / "lines.csv", index=False)
    for other in (config(table(photos, one)), config(table(photos, columns))):
        splits = load(other)
        assert everything(splits) == expected
    assert everything(load(config(photos / "lines.csv", multi_label=True))) == expected
    assert "line 3: 00.png is there before, with another label" in refusal(load, config(photos / "lines.csv"))
    plain = build_transform(ImageConfig(8, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0), DatasetConfig(), train=False)
    _, targets = next(iter(loader(separated.train, plain, 4, workers=0)))
    wanted = [[float(label in of) for label in range(3)] for of in separated.train.labels[:4]]
    assert targets.tolist() == wanted and str(targets.dtype) == "torch.float32"


def test_parquet_keeps_lists(photos):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"image": [f"{index:02}.png" for index in range(12)], "labels": [["a"], ["a", "b"], []] * 4})
    frame.set_index(pd.Index([f"photo {index}" for index in range(12)])).to_parquet(photos / "labels.parquet")
    splits = load(config(photos / "labels.parquet"))
    assert splits.multi_label and splits.classes == ["a", "b"] and everything(splits)["01.png"] == ("a", "b")


def test_paths_are_relative_to_the_file_or_the_root(photos, tmp_path):
    names = [f"{index:02}" for index in range(12)]  # endings are found
    for folder, settings in ((photos, {}), (tmp_path / "lists", {"root": str(photos)})):
        folder.mkdir(exist_ok=True)
        pd.DataFrame({"image_id": names, "label": SPECIES}).to_csv(folder / "a.tsv", sep="\t", index=False)
        assert len(everything(load(config(folder / "a.tsv", **settings)))) == 12
    assert load(config(tmp_path / "lists/a.tsv", root=str(photos))).revision == load(config(photos / "a.tsv")).revision
    assert "lists 12 images, of which 12 are not there" in refusal(load, config(tmp_path / "lists/a.tsv"))


def test_the_order_of_lines_does_not_matter_and_labels_do(photos):
    first = load(config(table(photos, {"label": SPECIES})))
    turned = pd.read_csv(photos / "labels.csv").iloc[::-1]
    turned.to_csv(photos / "turned.csv", index=False)
    again = load(config(photos / "turned.csv"))
    assert (again.revision, again.train.labels) == (first.revision, first.train.labels)
    assert load(config(table(photos, {"label": SPECIES[::-1]}))).revision != first.revision


def test_groups_stay_together(photos):
    animal = [f"animal {index // 2}" for index in range(12)]
    file = table(photos, {"label": ["owl"] * 6 + ["jay"] * 6, "animal": animal})
    splits = load(config(file, hold_out="animal", test_fraction=0.3, val_fraction=0.4))
    groups = [set(part.groups or ()) for part in (splits.train, splits.val, splits.test)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 6 and all(groups)
    assert "none in two splits" in describe(splits)
    assert "did you mean 'animal'" in refusal(load, config(file, hold_out="animals"))
    torn = table(photos, {"label": SPECIES, "animal": animal, "split": ["train", "test"] * 6})
    assert "6 in two splits (animal 0, animal 1, animal 2 and 3 more)" in describe(
        load(config(torn, hold_out="animal"))
    )


def test_what_can_not_be_read_is_refused_in_a_line(photos):
    good = table(photos, {"label": SPECIES})
    for settings, words in (
        ({"label_column": "lable"}, "no such column, but path, label (did you mean 'label'?)"),
        ({"class_columns": ["label"]}, "column 'label' has 'owl'; expected 0 or 1"),
        ({"class_columns": ["label"], "label_column": "label"}, "exclude each other"),
        ({"file": str(photos / "labels.xlsx")}, "expected a file that ends in .csv, .tsv, .parquet"),
        ({"file": str(photos / "none.csv")}, "can't be read"),
    ):
        assert words in refusal(load, DatasetConfig(**({"name": "table", "file": str(good)} | settings)))
    for text, words in (
        ("", "is no table"),
        ("path,label\n", "has no lines below its header"),
        ("00.png,owl\n01.png,jay\n", "begins with '00.png', not with the names of columns"),
        ("name,label\nfirst,owl\n", "has no column of image paths"),
        ("a,b,label\n00.png,01.png,owl\n", "several columns of images"),
        ("path,label,tag\n00.png,owl,x\n", "several columns of labels: label, tag"),
        ("path,x,y\n00.png,owl,x\n", "no column that is called label or class"),
        ("path,label\n00.png,owl\n01.png,owl\n", "has 1 class: owl; two classes are needed"),
        ("path,label\n00.png,\n01.png,\n", "has no labels; two classes are needed"),
        ("path,label\n00.png,owl,\n01.png,jay,\n", "is no table (line 2 has 3 fields, the header 2)"),
        ("path,label\n00.png,owl\n\n01.png,jay,x,y\n", "is no table (line 4 has 4 fields, the header 2)"),
        ("path,label\n00.png,owl\n\n\n00.png,jay\n", "line 5: 00.png is there before, with another label (jay, owl)"),
        ("path,label,split\n\n00.png,owl,train\n01.png,jay,tests\n", "line 4 has 'tests'; expected train, val or test"),
        ("path;label\n00.png;a,b,c;\n", "is no table (line 2 has 3 fields, the header 2)"),
        ('path,label\n00.png,"owl\n', "is no table"),
    ):
        (photos / "bad.csv").write_text(text)
        assert words in refusal(load, config(photos / "bad.csv")), text
    (photos / "bad.csv").write_text("path,owl,jay\n00.png,1,0\n01.png,,1\n")
    columns = DatasetConfig("table", file=str(photos / "bad.csv"), class_columns=["owl", "jay"])
    assert "column 'owl' has ''; expected 0 or 1" in refusal(load, columns)
    (photos / "bad.csv").write_text("path,owl,jay\n00.png,1,0\n01.png,0,1\n00.png,0,1\n")
    assert "line 4: 00.png is there before, with other marks" in refusal(load, columns)
    columns = DatasetConfig("table", file=str(photos / "bad.csv"), class_columns=["owl", "jay", "owl"])
    assert "dataset.class_columns: 'owl' more than once" in refusal(load, columns)
    (photos / "bad.csv").write_text("path,label,animal\n00.png,owl,a\n01.png,jay,b\n00.png,owl,b\n")
    assert "is there before, in another group (a, b)" in refusal(load, config(photos / "bad.csv", hold_out="animal"))
    (photos / "bad.csv").write_text(f"path,label\n00.png,owl\n{5000 * 'a'}.png,jay\n")
    assert 40 < len(refusal(load, config(photos / "bad.csv"))) < 700
    (photos / "bad.csv").write_bytes("path,label\n00.png,é\n".encode("latin1"))
    assert "is not in UTF-8" in refusal(load, config(photos / "bad.csv"))
    gone = pd.read_csv(good)
    gone.loc[0, "path"], gone.loc[1, "label"] = "gone.png", None
    gone.to_csv(photos / "gone.csv", index=False)
    assert "lists 11 images, of which 1 are not there" in refusal(load, config(photos / "gone.csv"))
    left_out = load(config(photos / "gone.csv", on_corrupt="skip")).left_out
    assert left_out == ["1 image without a label (01.png)", "1 that can't be read (gone.png: it is gone)"]


def test_classes_are_counted_without_the_images(tmp_path):
    assert sizes(config(tmp_path / "none.csv"))[2] is not None
    (tmp_path / "labels.csv").write_text("path,label\na.jpg,x\nb.jpg,y\nc.jpg,z\n")
    assert count_classes(tmp_path / "labels.csv", config(tmp_path / "labels.csv")) == 3
    assert sizes(config(tmp_path / "labels.csv"))[::2] == (3, None)


def test_a_name_that_no_file_can_have_is_one_that_can_not_be_read(photos):
    lines = "".join(f"{index:02}.png,{SPECIES[index]}\n" for index in range(12))
    (photos / "labels.csv").write_text(f"path,label\n{lines}a\0b.png,owl\n")
    splits = load(config(photos / "labels.csv", on_corrupt="skip"))
    assert len(everything(splits)) == 12 and "can't be read" in splits.left_out[0]


def test_lines_that_repeat_an_image_are_counted(photos):
    file = table(photos, {"owl": [1, 0] * 6, "jay": [0, 1] * 6})
    file.write_text(file.read_text() + "00.png,1,0\n\n")
    assert "1 line of an image that is there before" in load(config(file, class_columns=["owl", "jay"])).left_out
