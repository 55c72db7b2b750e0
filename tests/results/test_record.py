"""Records and metrics as strangers' folders may hold them, and the folders themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import fuzz_records
import pytest

from s2a_cli.cli.main import main
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import printable
from s2a_cli.results import aggregate, run_folder, summary
from s2a_cli.results import record as records


def written(folder, record):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_bytes(record if isinstance(record, bytes) else json.dumps(record).encode())
    return folder


def with_value(record, place, value):
    *parents, last = place.split(".")
    node = record
    for parent in parents:
        node = node[parent]
    node[last] = value
    return record


def test_any_damage_is_one_line_of_one_file():
    fuzz_records.fuzz(30, page_every=15, same=True)


CHOICE = dict.fromkeys(("needed_mib", "predicted_seconds", "measured_seconds", "fidelity"))
CHOICE |= {"about": "", "words": [], "why": ""}
PLAN = {"available_mib": 1.0, "batch": 1, "device": "cpu", "seconds": 1.0, "asked": {}, "settings": {"quant": "x"}}
ODD = [
    ("plan", PLAN | {"choices": [CHOICE]}, "quant: \"x\", expected its settings"),
    ("accuracy.test_top1", "ninety", "accuracy.test_top1: \"ninety\", expected float"),
    ("parameters.trainable", {}, "parameters.trainable: {}, expected int"),
    ("memory.peak_mib", 10**400, "is no figure"),
    ("memory.kind", "guessed", "memory.kind: \"guessed\", expected measured-cuda, predicted"),
    ("config.seed", "zero", "config.seed: \"zero\", expected an integer"),
    ("config.method", "s2a", "config.method: \"s2a\", expected its settings"),
    ("config.method.name", 7, "config.method.name: 7, expected a name"),
    ("data.name", "\ud800", "data.name: a text that is no Unicode"),
    ("data.name", "x" * 10_000, "expected a name"),
    ("status", "fine", "status: \"fine\", expected ok, oom, failed, interrupted"),
    ("schema", 0, "not a result of schema 1; train this run again"),
]  # fmt: skip


@pytest.mark.parametrize("place, value, reason", ODD)
def test_a_value_that_no_run_writes_leaves_the_file_out_by_name(
    write_result, make_result, tmp_path, capsys, place, value, reason
):
    write_result("good")
    written(tmp_path / "runs" / "odd", with_value(make_result(), place, value))
    for words in (["table"], ["table", "rows=dataset,seed"], ["report", f"out={tmp_path / 'p.html'}"]):
        assert main([*words, str(tmp_path / "runs")]) == 0
        said = capsys.readouterr()
        assert "runs/odd/result.json" in said.err and reason in said.err
    with pytest.raises(UserError, match="can't be read"):
        records.read_result(tmp_path / "runs" / "odd")


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"schema": 1}', b"\xff\xfe", b"", b"null", b'{"schema": 1, "id": 1e400}']
)
def test_a_file_that_is_no_record_is_left_out_by_name(write_result, tmp_path, capsys, content):
    write_result("good")
    written(tmp_path / "runs" / "odd", content)
    assert main(["table", str(tmp_path / "runs")]) == 0
    assert "1 of 2 results can't be read, left out:\n  " in capsys.readouterr().err


def test_a_pipe_or_a_device_is_never_read(write_result, tmp_path, capsys):
    good = write_result("good")
    os.mkfifo(good / "metrics.jsonl")
    for name in ("pipe", "device", "folder"):
        (tmp_path / "runs" / name).mkdir()
    os.mkfifo(tmp_path / "runs" / "pipe" / "result.json")
    (tmp_path / "runs" / "device" / "result.json").symlink_to("/dev/zero")
    (tmp_path / "runs" / "folder" / "result.json").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "s2a_cli", "report", "runs"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no regular file") == 3 and "metrics.jsonl: no regular file" in done.stderr
    for name in ("pipe", "device"):
        with pytest.raises(UserError, match="no regular file"):
            records.read_result(tmp_path / "runs" / name)
    with pytest.raises(ValueError, match="more than 0 MiB"):
        records.regular(good / "result.json", most=10)


@pytest.mark.parametrize(
    "line", [b"\xff\n", b'{"epoch": 1e400, "val_top1": 5}\n', b'{"epoch": "1", "val_top1": 5}\n', b"[]\n"]
)
def test_metrics_that_no_run_writes_are_left_out_by_name(write_result, tmp_path, capsys, line):
    for name in ("good", "odd"):
        folder = write_result(name, method={"good": "s2a", "odd": "bias"}[name])
        (folder / "metrics.jsonl").write_bytes((line if name == "odd" else b"") + fuzz_records.LINES)
    assert main(["report", str(tmp_path / "runs"), f"out={tmp_path / 'p.html'}"]) == 0
    assert "odd/metrics.jsonl" in capsys.readouterr().err and "odd/metrics.jsonl" in (tmp_path / "p.html").read_text()
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(fuzz_records.LINES + b'{"epoch": 4, "val')
    assert records.read_metrics(cut) == [(1, 51.0), (2, 52.0), (3, 53.0)]


def test_a_record_of_an_older_version_has_none_for_what_it_lacks(make_result, tmp_path):
    older = make_result()
    del older["throughput"], older["error"], older["accuracy"]["test_top5"]
    read = records.read_result(written(tmp_path, older))
    assert (
        read["throughput"] == {"train_images_per_second": None}
        and read["error"] is None
        and read["accuracy"]["test_top5"] is None
    )
    assert read["allocation"] is None and read["accuracy"]["test_top1"] == 90.0


def begun(make_result):
    """What is known of a run before its first step."""
    made = make_result()
    names = ("id", "config", "parameters", "data", "weights", "environment")
    return records.RecordBuilder(**{name: made[name] for name in names})


def test_the_record_of_a_run_that_is_killed_says_so(make_result, tmp_path):
    result = begun(make_result).result()
    assert list(result) == list(records.Result.__annotations__), "the order of the keys in result.json"
    assert (result["status"], result["error"]) == ("interrupted", "the run did not end")
    assert result["memory"] is None and set(result["accuracy"].values()) == {None}
    records.write_result(tmp_path, result)
    assert records.read_result(tmp_path) == result


def test_a_record_is_built_of_what_becomes_known(make_result, tmp_path):
    known, other, memory = begun(make_result), begun(make_result), make_result()["memory"]
    known.predicted(memory)
    before = known.result()
    known.validated({"top1": 70.0, "loss": 1.0}, 1)
    known.validated({"top1": 80.0, "balanced": 60.0, "loss": 0.9}, 2)
    known.tested({"top1": 75.0, "top5": None, "balanced": 55.0, "loss": 0.9})
    measured = memory | {"kind": "measured-cuda", "peak_mib": 123.0, "reserved_mib": 200.0}
    known.measured(measured | {"full_finetune_peak_mib": None, "full_finetune_kind": None})
    known.images_per_second = 33.0
    known.ended("ok")
    result = known.result()
    figures = {"val_top1": 80.0, "val_balanced": 60.0, "test_top1": 75.0, "test_balanced": 55.0, "best_epoch": 2}
    assert result["accuracy"] == dict.fromkeys(("val_map", "test_map", "test_top5")) | figures
    assert records.headline(result["accuracy"]) == ("top-1", 80.0, 75.0)
    assert records.headline(result["accuracy"] | {"val_map": 50.0}).name == "mAP"
    assert result["memory"] == measured, "full fine-tuning's peak stays the predicted one"
    assert (result["status"], result["error"]) == ("ok", None)
    assert before["accuracy"]["val_top1"] is None and before["memory"] == memory, "a record that was given stays"
    assert other.result()["accuracy"]["val_top1"] is None, "builders share nothing"
    records.write_result(tmp_path, result)
    assert records.read_result(tmp_path) == result


HOSTILE = "a$b$\n\x1b[31m=x"


def test_names_with_dollars_newlines_and_escapes(write_result, tmp_path, capsys):
    for method, peak in (("=cmd()", 10.0), ("bias", 20.0)):
        folder = write_result(method, dataset=HOSTILE, method=method, peak=peak)
        (folder / "metrics.jsonl").write_bytes(fuzz_records.LINES)
    runs, page = str(tmp_path / "runs"), tmp_path / "page.html"
    assert main(["report", runs, f"out={page}"]) == 0
    assert "a$b$\\n\\x1b[31m=x" in page.read_text() and page.read_text().count('<div class="panels">') == 3
    assert main(["table", runs, f"figure={tmp_path / 'f.pdf'}"]) == 0
    capsys.readouterr()
    for form in ("terminal", "md", "latex", "csv", "html"):
        assert main(["table", runs, f"format={form}"]) == 0
        said = capsys.readouterr().out
        assert "\x1b" not in said and not any(line.startswith(("\x1b", "[31m")) for line in said.splitlines())
        if form == "csv":
            assert ",'=cmd()," in said and ",=cmd()" not in said
    assert printable("Katze\u00a0é 猫 👩\u200d🔬") == "Katze\u00a0é 猫 👩\u200d🔬"


def test_an_error_about_a_name_moves_no_cursor(tmp_path, capsys):
    assert main(["table", str(tmp_path / "\x1b[2Jrnus")]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_run_that_is_training_is_shown_as_running(write_result, tmp_path, capsys):
    folder = write_result("a", status="interrupted")
    write_result("b", status="interrupted", seed=1)
    with run_folder.claimed(folder):
        rows = summary.table(aggregate.load([tmp_path / "runs"]))
        assert set(rows["status"][0].split(", ")) == {"1 interrupted", "1 running"}
        assert main(["report", str(tmp_path / "runs"), f"out={tmp_path / 'p.html'}"]) == 0
        assert "1 running" in (tmp_path / "p.html").read_text()
    assert summary.table(aggregate.load([tmp_path / "runs"]))["status"].tolist() == ["2 interrupted"]


@pytest.mark.parametrize("name", ["thesis.tex", "page.html", "figure.svg", "figure.pdf"])
def test_only_what_s2a_made_is_overwritten(write_result, tmp_path, capsys, name):
    for method, peak in (("s2a", 10.0), ("bias", 20.0)):
        write_result(method, method=method, peak=peak)
    out = tmp_path / name
    words = (
        ["table", str(tmp_path / "runs"), f"figure={out}"]
        if "figure" in name
        else ["report", str(tmp_path / "runs"), f"out={out}"]
    )
    out.write_text("years of work")
    assert main(words) == 2 and out.read_text() == "years of work"
    assert "is there, and was not made by s2a" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0 and out.read_bytes() != b"years of work"
    assert main(words) == 0, "its own file, again"
    out.unlink()
    out.symlink_to("/dev/null")
    assert main([*words, "--force"]) == 2 and "is no file" in capsys.readouterr().err


def test_a_folder_of_somebody_is_refused_and_nothing_in_it_is_touched(tmp_path):
    for name in (".env.template", ".env.defaults", "notes.txt", "result.json", "config.yaml"):
        (tmp_path / name).write_text('{"mine": true}')
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(
        UserError,
        match=(
            r"run_dir=.*: holds .env.defaults, .env.template, notes.txt and 2 more, and no run; set run_dir= to a new"
        ),
    ):
        run_folder.usable(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    for name in (".env.template", ".env.defaults", "notes.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="holds config.yaml, result.json, and no run"):
        run_folder.usable(tmp_path)


def test_only_litter_with_names_of_ours_is_removed(make_result, tmp_path):
    written(tmp_path, make_result())
    for name in (".env.template", ".result.json.0123abcd", ".state.pt.abcdefgh", ".notes.txt.abcdefgh", "photo.jpg"):
        (tmp_path / name).write_text("")
    run_folder.usable(tmp_path)
    with run_folder.claimed(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {
        ".env.template",
        ".notes.txt.abcdefgh",
        "photo.jpg",
        "result.json",
        ".lock",
    }


def test_where_a_run_is_made(make_result, tmp_path):
    mine, other = make_result(), make_result(optim__lr=0.5, seed=3)
    content, another = records.content_of(mine), records.content_of(other)
    assert run_folder.place(tmp_path, content, False) == tmp_path, "an empty folder"
    written(tmp_path, mine)
    assert run_folder.place(tmp_path, content, False) is None, "finished"
    assert run_folder.place(tmp_path, content, True) == tmp_path / run_folder.NEXT
    with pytest.raises(
        UserError,
        match=r"holds a finished run of another config \(optim.lr=0.001, here 0.5; seed=0, here 3\); --force replaces",
    ):
        run_folder.place(tmp_path, another, False)
    assert run_folder.place(tmp_path, another, True) == tmp_path / run_folder.NEXT
    written(tmp_path / run_folder.NEXT, other | {"status": "interrupted"})
    assert run_folder.place(tmp_path, another, False) == tmp_path / run_folder.NEXT, "asked for before, and broken off"
    assert run_folder.place(tmp_path, content, False) is None and run_folder.state(tmp_path, content) == ("done", None)
    written(tmp_path, mine | {"status": "interrupted"})
    assert run_folder.place(tmp_path, another, False) == tmp_path, "nothing was trained"
    (tmp_path / run_folder.STATE).write_text("")
    with pytest.raises(UserError, match="holds an unfinished run of another config"):
        run_folder.place(tmp_path, another, False)
    assert run_folder.place(tmp_path, content, False) == run_folder.place(tmp_path, another, True) == tmp_path


def test_tensors_beside_a_damaged_record_are_not_lost(make_result, tmp_path, capsys):
    content = records.content_of(make_result())
    for name in ("named", records.run_id(content)):
        folder = written(tmp_path / name, b"{half")
        (folder / run_folder.TENSORS).write_text("dear")
        with run_folder.claimed(folder):
            if name == "named":
                with pytest.raises(UserError, match="result.json: can't be read .*--force trains anew"):
                    run_folder.place(folder, content, False)
            assert run_folder.place(folder, content, name == "named") == folder / run_folder.NEXT
        assert "named" not in name or "trained anew, the old files stay" in capsys.readouterr().err


def test_a_replacement_counts_when_its_record_says_ok_and_is_moved_whatever_breaks(make_result, tmp_path, monkeypatch):
    new = make_result(top1=50.0)
    real, calls = os.replace, []
    for breaks in range(1, 5):
        folder = written(tmp_path / str(breaks), make_result())
        (folder / run_folder.TENSORS).write_text("old")
        begun = written(folder / run_folder.NEXT, new | {"status": "interrupted"})
        (begun / run_folder.TENSORS).write_text("new")
        (begun / run_folder.METRICS).write_text("new")
        run_folder.settle(folder)
        assert records.read_result(folder)["accuracy"]["test_top1"] == 90.0
        written(begun, new)
        calls.clear()

        def replace(*args, breaks=breaks):
            calls.append(args)
            if len(calls) == breaks:
                raise KeyboardInterrupt
            real(*args)

        monkeypatch.setattr(os, "replace", replace)
        if breaks < 4:
            with pytest.raises(KeyboardInterrupt):
                run_folder.settle(folder)
        monkeypatch.setattr(os, "replace", real)
        with run_folder.claimed(folder):
            pass
        assert records.read_result(folder)["accuracy"]["test_top1"] == 50.0
        assert (folder / run_folder.TENSORS).read_text() == (
            folder / run_folder.METRICS
        ).read_text() == "new" and not begun.exists()


def test_what_was_made_of_a_run_goes_with_it_and_nothing_else(make_result, tmp_path):
    folder = written(tmp_path / "run", make_result())
    for place in ("evaluation", "evaluation-other-0123456789ab", "evaluations"):
        (folder / place).mkdir()
        (folder / place / "evaluation.json").touch()
    (folder / "evaluation" / "mine.txt").touch()
    (folder / "report.html").write_text("<title>s2a report</title>")
    (tmp_path / "evaluation.json").touch()
    (folder / "evaluation-link").symlink_to(tmp_path)
    written(folder / run_folder.NEXT, make_result(top1=50.0))
    run_folder.settle(folder)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == {
        *("result.json", "evaluation", "evaluation/mine.txt", "evaluations", "evaluations/evaluation.json"),
        "evaluation-link",
    }
    assert (tmp_path / "evaluation.json").exists()
    written(folder / run_folder.NEXT, make_result(top1=60.0))
    (folder / "report.html").write_text("a page of my own")
    run_folder.settle(folder)
    assert (folder / "report.html").exists()


def test_a_link_where_a_lock_or_a_replacement_should_be_is_refused(make_result, tmp_path):
    folder, outside = written(tmp_path / "run", make_result()), tmp_path / "outside"
    outside.mkdir()
    (folder / run_folder.NEXT).symlink_to(outside)
    with pytest.raises(UserError, match="is a link; remove it"):
        run_folder.place(folder, records.content_of(make_result()), True)
    (outside / "file").write_text("mine")
    (folder / run_folder.LOCK).symlink_to(outside / "file")
    with pytest.raises(UserError, match="can't be locked"), run_folder.claimed(folder):
        pass
    assert (outside / "file").read_text() == "mine"


def test_a_key_that_could_end_a_line_is_shown_as_an_escape(make_result, tmp_path):
    """Keys of a stranger's config are named where it differs."""
    odd = with_value(make_result(), "config.method.lr", {"a\nb\x1b[2J": None})
    folder = written(tmp_path / "odd", odd)
    (folder / "trainable.safetensors").touch()
    with pytest.raises(UserError, match="another config") as raised:
        run_folder.place(folder, records.content_of(make_result(method="bias")), False)
    assert len(str(raised.value).splitlines()) == 1 and "a\\nb\\x1b[2J" in str(raised.value)
    assert str(UserError("one\ntwo\r")) == "one\ntwo\\r"
