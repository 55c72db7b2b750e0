"""What long work says of how far it is."""

from s2a_cli.common.progress import Progress
from s2a_cli.common.text import duration, size


def test_progress_lines():
    assert [size(n) for n in (0, 999, 14_989, 6_062_039_589)] == ["0 B", "999 B", "15.0 kB", "6.1 GB"]
    assert [duration(s) for s in (5, 540, 9000)] == ["5 s", "9 min", "2.5 h"]
    progress = Progress("real.zip", 6_000_000_000, "B", done=1_000_000_000)
    progress.done += 1_000_000_000
    assert progress.line(100.0) == "real.zip: 2.0 GB of 6.0 GB, 10.0 MB/s, 7 min left"


def test_progress_without_a_terminal_is_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr("s2a_cli.common.progress.SECONDS_BETWEEN_LINES", 0.0)
    with Progress("checking photos", 3, "images") as progress:
        progress.add(1)
        progress.add(2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith("checking photos: 3 images of 3 images, ")
    assert "\r" not in "".join(lines)


def test_what_was_done_by_an_earlier_attempt_has_no_rate(capsys):
    with Progress("training", 240, " images", done=90) as progress:
        progress.note("epoch 3/8")
        assert progress.line(5.0) == "training: 90 images of 240 images"
    assert capsys.readouterr().err == "epoch 3/8\n"
