"""Damaged records and metrics, drawn by hypothesis, and what s2a must make of them: used by test_records.py with few
examples, and
by scripts/fuzz.py with many."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from example_result import result
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from s2a_cli.cli.main import main
from s2a_cli.common.errors import UserError
from s2a_cli.results import record as records
from s2a_cli.results import run_folder

SECONDS = 10.0  # of this process, within which a command must be done with a damaged file
CODES = (0, 2)
NAMES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "$",
            "$a$b$",
            "a_b",
            "=1+1",
            "-1",
            "a|b",
            "\x1b[31mred",
            "a\nb",
            "\\end{tabular}",
            "<script>",
            "\ud800",
            "x" * 400,
            "\u202e",
            "dataset",
        ]
    ),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    NAMES,
    st.integers(-3, 300),
    st.floats(width=32),
    st.sampled_from(
        [10**30, -(10**400), 2**64, 1e300, 5e-324, 0, "12", "nan", "ok", "predicted", [], {}, [[]], {"": {}}]
    ),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)


def _places(node: object, here: tuple = ()) -> list[tuple]:
    """The path of every value of a record."""
    pairs = node.items() if isinstance(node, dict) else ()
    return [here, *(place for key, inner in pairs for place in _places(inner, (*here, key)))]


PLACES = _places(result())[1:]


@st.composite
def altered(draw: st.DrawFn) -> bytes:
    """A record in which up to three values are others, are missing, or have a neighbour."""
    found = copy.deepcopy(
        result(seed=draw(st.integers(0, 3)), status=draw(st.sampled_from(["ok", "ok", "oom", "interrupted"])))
    )
    for place in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3)):
        node, how = found, draw(st.sampled_from(["other", "other", "missing", "beside"]))
        for key in place[:-1]:
            node = node.get(key) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            continue
        if how == "missing":
            node.pop(place[-1], None)
        else:
            node[place[-1] if how == "other" else draw(NAMES)] = draw(VALUES)
    return json.dumps(found).encode()


@st.composite
def torn(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file that is cut, or has bytes that it should not have."""
    at, to = sorted((draw(st.integers(0, len(whole))), draw(st.integers(0, len(whole)))))
    between = st.one_of(
        st.binary(max_size=8),
        st.sampled_from([b"", b"[" * 100_000, b'{"a":' * 5_000, b"\xff", b"1e400", b"\xef\xbb\xbf", b"9" * 5_000]),
    )
    return whole[:at] + draw(between) + (whole[to:] if draw(st.booleans()) else b"")


RECORDS = st.one_of(
    altered(), altered(), torn(json.dumps(result()).encode()), VALUES.map(lambda value: json.dumps(value).encode())
)
LINES = "".join(
    json.dumps({"epoch": epoch, "val_top1": 50.0 + epoch, "val_loss": 1.0}) + "\n" for epoch in (1, 2, 3)
).encode()
METRICS = st.one_of(
    torn(LINES),
    st.lists(
        st.fixed_dictionaries({"epoch": VALUES, "val_top1": VALUES}).map(lambda line: json.dumps(line).encode()),
        max_size=4,
    ).map(b"\n".join),
)


def said(*words: str) -> str:
    """What a command says; it must end in time, with an exit code that says ok or bad input, and not in words of
    Python's.
    """
    out, err, began = io.StringIO(), io.StringIO(), time.process_time()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(list(words))
    assert code in CODES and "--debug" not in err.getvalue(), (words, code, err.getvalue())
    assert time.process_time() - began < SECONDS, words
    (out.getvalue() + err.getvalue()).encode()  # no half characters
    assert "\x1b" not in out.getvalue() + err.getvalue()
    return out.getvalue() + err.getvalue()


def check(record: bytes, metrics: bytes, page: bool) -> None:
    """A folder with a good run and a damaged one: all that reads records reads them, and shows the good one."""
    root = Path(tempfile.mkdtemp())
    try:
        for name, data in (("good", json.dumps(result(method="bias", top1=77.25)).encode()), ("odd", record)):
            (root / "runs" / name).mkdir(parents=True)
            (root / "runs" / name / "result.json").write_bytes(data)
            (root / "runs" / name / "metrics.jsonl").write_bytes(metrics if name == "odd" else LINES)
        before = _files(root)
        for words in (
            [],
            ["rows=method", "cols=dataset"],
            ["rows=dataset,seed", "value=peak"],
            ["format=latex"],
            ["format=csv"],
        ):
            assert "77.25" in said("table", str(root / "runs"), *words) or "value=peak" in words
        if page:
            said("report", str(root / "runs"), f"out={root / 'page.html'}")
            assert "77.25" in (root / "page.html").read_text()
            (root / "page.html").unlink()
        good = records.read_result(root / "runs" / "good")
        assert run_folder.state(root / "runs" / "good", records.content_of(good)) == ("done", None)
        assert run_folder.state(root / "runs" / "odd", records.content_of(good))[0] in (
            "new",
            "done",
            "oom",
            "failed",
            "interrupted",
        )
        for force in (False, True):
            try:
                run_folder.place(root / "runs" / "odd", records.content_of(good), force)
            except UserError as error:
                assert len(str(error).splitlines()) == 1
        for name in ("good", "odd"):
            (root / "runs" / name / ".lock").unlink(missing_ok=True)
        assert _files(root) == before
    finally:
        shutil.rmtree(root)


def _files(root: Path) -> dict[str, bytes]:
    return {os.path.relpath(path, root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def fuzz(examples: int, page_every: int = 20, same: bool = False) -> None:
    """Draws so many damaged runs, each time the same ones or others; a page is made of one in `page_every`: it takes
    most of the time.
    """
    count, phases = [0], (Phase.generate, Phase.shrink)

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=phases,
        database=None,
        derandomize=same,
    )
    @given(RECORDS, METRICS)
    def one(record: bytes, metrics: bytes) -> None:
        count[0] += 1
        check(record, metrics, page=count[0] % page_every == 0)

    one()
