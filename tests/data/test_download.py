"""Downloads: resumed, verified, from several sources, and never half there."""

from __future__ import annotations

import io
import tarfile
import threading

import pytest
from archive_files import add_file
from fake_web import CONTENT, Served, remote
from refusals import refusal

from s2a_cli.common.progress import Progress
from s2a_cli.data import download
from s2a_cli.data.download import fetch, fetch_tree


def test_a_file_arrives_once(web, tmp_path):
    url, paths = web
    paths["/a"] = Served(CONTENT)
    file = remote(url, "/a")
    for _ in range(2):
        assert fetch(file, tmp_path / "new" / "folder").read_bytes() == CONTENT
    assert paths["/a"].requests == [None]
    assert not list((tmp_path / "new/folder").glob("*.part"))


@pytest.mark.parametrize("served", [Served(), Served(ranges=False), Served(chunked=True, ranges=False)])
def test_a_part_is_resumed(web, tmp_path, served):
    url, paths = web
    served.content, paths["/a"] = CONTENT, served
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(remote(url, "/a"), tmp_path).read_bytes() == CONTENT
    assert served.requests == ["bytes=1000-"]


@pytest.mark.parametrize(
    "part", [b"x" * 1000, CONTENT + b"more", b"x" * len(CONTENT)], ids=["other bytes", "too long", "as long but other"]
)
def test_a_wrong_part_is_thrown_away(web, tmp_path, part):
    url, paths = web
    paths["/a"] = Served(CONTENT)
    (tmp_path / "data.bin.part").write_bytes(part)
    assert fetch(remote(url, "/a"), tmp_path).read_bytes() == CONTENT
    assert paths["/a"].requests[-1] is None


def test_a_connection_that_breaks_is_taken_up_again(web, tmp_path):
    url, paths = web
    paths["/a"] = Served(CONTENT, breaks_after=300_000)
    assert fetch(remote(url, "/a"), tmp_path).read_bytes() == CONTENT
    assert paths["/a"].requests == [None, "bytes=300000-", "bytes=600000-"]


def test_a_part_survives_an_interruption(web, tmp_path, monkeypatch):
    url, paths = web
    paths["/a"] = Served(CONTENT)

    def interrupt(self, amount):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(remote(url, "/a"), tmp_path)
    assert (tmp_path / "data.bin.part").stat().st_size > 0
    assert fetch(remote(url, "/a"), tmp_path).read_bytes() == CONTENT
    assert paths["/a"].requests[1].startswith("bytes=")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Served(status=404), "404"),
        (Served(status=503), "503"),
        (Served(b"x" * len(CONTENT)), "wrong SHA-256"),
        (Served(b"<html>moved</html>"), "offers 18 bytes instead of 768000"),
        (Served(b"<html>moved</html>", chunked=True), "wrong SHA-256"),
        (Served(CONTENT + b"more", chunked=True), "wrong SHA-256"),
        (Served(CONTENT, breaks_after=0), "more expected"),
        (Served(CONTENT, stalls=True), "timed out"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_next_source_is_tried(web, tmp_path, monkeypatch, bad, reason):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    url, paths = web
    paths["/bad"], paths["/good"] = bad, Served(CONTENT)
    assert fetch(remote(url, "/bad", "/good"), tmp_path).read_bytes() == CONTENT
    assert bad.requests
    message = refusal(fetch, remote(url, "/bad"), tmp_path / "other")
    assert reason in message and f"{url}/bad" in message
    assert not list((tmp_path / "other").glob("data.bin"))


def test_an_error_page_does_not_cost_a_good_part(web, tmp_path):
    url, paths = web
    paths["/bad"] = Served(b"<html>moved</html>", ranges=False)
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    refusal(fetch, remote(url, "/bad"), tmp_path)
    assert (tmp_path / "data.bin.part").read_bytes() == CONTENT[:1000]


def test_a_part_longer_than_what_a_server_has(web, tmp_path):
    url, paths = web
    paths["/short"], paths["/good"] = Served(CONTENT[:500]), Served(CONTENT)
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(remote(url, "/short", "/good"), tmp_path).read_bytes() == CONTENT
    assert paths["/good"].requests == ["bytes=1000-"]


def test_without_a_network_the_message_says_what_to_do(tmp_path):
    file = remote("http://127.0.0.1:9", "/a", "/b")  # the discard port: nothing listens
    for message in (refusal(fetch, file, tmp_path), refusal(fetch, file, tmp_path, download=False)):
        for part in ("data.bin", "768.0 kB", file.sha256, str(tmp_path), *file.urls):
            assert part in message
    assert "dataset.download=false" in refusal(fetch, file, tmp_path, download=False)
    (tmp_path / file.name).write_bytes(CONTENT)
    assert fetch(file, tmp_path, download=False).read_bytes() == CONTENT


def test_a_wrong_file_put_there_by_hand_is_named_and_kept(web, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"something else")
    message = refusal(fetch, remote(web[0], "/a"), tmp_path)
    assert str(tmp_path / "data.bin") in message and "SHA-256" in message
    assert (tmp_path / "data.bin").read_bytes() == b"something else"


def test_a_folder_that_cannot_be_written(web, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write to" in refusal(fetch, remote(web[0], "/a"), tmp_path / "file" / "data")


def test_runs_that_start_together_download_once(web, tmp_path):
    url, paths = web
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        add_file(archive, "tree/a.txt", b"a")
    paths["/t"] = Served(buffer.getvalue())
    file = remote(url, "/t", content=buffer.getvalue(), name="t.tar.gz")
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch_tree(file, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths["/t"].requests) == 1
    assert [(path / "tree/a.txt").read_text() for path in found] == ["a"] * 4
