"""Damaged images in a folder, and the report on its files that is kept."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from pictures import folder_config, save, tree
from refusals import folder_refusal

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import open_regular
from s2a_cli.data import integrity, load


def damage(root: Path) -> list[Path]:
    truncated = save(root / "cat" / "truncated.jpg", 7, size=(64, 64))
    truncated.write_bytes(truncated.read_bytes()[:-200])
    text = root / "cat" / "text.png"
    text.write_text("<html>not found</html>")
    empty = root / "dog" / "empty.gif"
    empty.write_bytes(b"")
    broken = save(root / "dog" / "broken.png", 8, size=(64, 64))
    broken.write_bytes(broken.read_bytes()[:100] + bytes(50) + broken.read_bytes()[150:])
    return [truncated, text, empty, broken]


def test_damaged_images_stop_the_run(tmp_path):
    root = tree(tmp_path / "photos")
    bad = damage(root)
    message = folder_refusal(root)
    assert all(path.name in message for path in bad) and "and 3 more" in message and "on_corrupt=skip" in message
    for path in bad[1:]:
        path.unlink()
    message = folder_refusal(root)
    assert message.startswith(f"{bad[0]} is not a readable image (") and "truncated" in message


def test_damaged_images_are_left_out(tmp_path):
    root = tree(tmp_path / "photos")
    clean = load(folder_config(root))
    bad = damage(root)
    for _ in range(2):  # the second time from the cache
        splits = load(folder_config(root, on_corrupt="skip"))
        assert sum(map(len, (splits.train, splits.val, splits.test))) == 12
        (said,) = splits.left_out
        assert said.startswith("4 that can't be read (cat/text.png: its content is none of JPEG, ")
        assert all(path.relative_to(root).as_posix() in said for path in bad)
    assert splits.revision != clean.revision


def test_a_class_of_damaged_images_alone(tmp_path):
    root = tree(tmp_path / "photos")
    damage(root)
    (root / "bird").mkdir()
    (root / "bird" / "0.png").write_text("no image")
    assert "no readable image in class 'bird'" in folder_refusal(root, on_corrupt="skip")


def test_what_is_no_file_is_a_damaged_image(tmp_path):
    root = tree(tmp_path / "photos")
    (root / "cat" / "gone.png").symlink_to(tmp_path / "gone.png")
    (root / "cat" / "loop.png").symlink_to("loop.png")
    (root / "cat" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "cat" / "pipe.png")
    message = folder_refusal(root)
    assert (
        message.startswith(f"{root / 'cat/gone.png'} is not a readable image (a link to what is not there)")
        and "and 3 more" in message
    )
    for _ in range(2):
        splits = load(folder_config(root, on_corrupt="skip"))
        assert len(splits.train) + len(splits.val) + len(splits.test) == 12
        assert (
            "cat/pipe.png: a pipe, not a file" in splits.left_out[0]
            and "cat/zero.png: a device, not a file" in splits.left_out[0]
        )
    shutil.copy(root / "cat" / "0.png", tmp_path / "gone.png")
    assert len(load(folder_config(root, on_corrupt="skip")).train) == 9, "the link leads to something now"


def test_a_file_that_can_not_be_opened_for_now_is_tried_again(tmp_path, monkeypatch):
    root = tree(tmp_path / "photos")

    def fails(path):
        if path.name == "3.png":
            raise OSError(errno.EIO, "Input/output error")
        return open_regular(path)

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "open_regular", fails)
        assert "and 1 more" in folder_refusal(root)
    assert len(load(folder_config(root)).train) == 8


def test_a_file_larger_than_an_image_can_be_is_not_read(tmp_path):
    root = tree(tmp_path / "photos")
    with open(root / "cat" / "large.png", "wb") as stream:
        stream.truncate(3 << 30)  # of which the disk holds nothing
    assert "large.png is not a readable image (3.2 GB, more than an image has)" in folder_refusal(root)


def test_a_change_that_size_and_time_do_not_tell_is_seen(tmp_path):
    root = tree(tmp_path / "photos", suffix=".bmp")
    first = load(folder_config(root)).revision
    path = root / "cat" / "0.bmp"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-3] ^= 1
    for replaced in (False, True):
        content[-4] ^= 1
        if replaced:  # as an archive does that is unpacked again
            path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
        now = load(folder_config(root)).revision
        assert now != first
        first = now


@pytest.mark.parametrize(
    "kept", ["", "{}", "[]", '{"revision": 1, "damaged": {}, "dark": [], "same": []}', "[" * 10**5]
)
def test_a_kept_report_that_is_damaged_is_made_again(tmp_path, cache, kept):
    root = tree(tmp_path / "photos")
    first = load(folder_config(root))
    (report,) = (cache / "folder" / "checked").iterdir()
    report.write_text(kept)
    assert load(folder_config(root)).revision == first.revision


def test_an_image_damaged_later_is_named(tmp_path):
    root = tree(tmp_path / "photos")
    splits = load(folder_config(root))
    Path(splits.train.name(0)).write_bytes(b"overwritten")
    with pytest.raises(UserError, match="is not a readable image") as error:
        splits.train[0]
    assert splits.train.name(0) in str(error.value)
