"""The page of `s2a report`: whole, escaped, and alive in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from s2a_cli.cli.main import main
from s2a_cli.common.errors import UserError
from s2a_cli.results import aggregate, html_report, plots, summary

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADLESS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
HEADLESS += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--window-size=1280,3000"]
CLICKS = """
<script>
const cells = (id, column) => [...document.getElementById(id).tBodies[0].rows]
  .filter((row) => !row.hidden).map((row) => row.cells[column].textContent);
const head = (id, name) => [...document.getElementById(id).tHead.rows[0].cells]
  .find((cell) => cell.textContent === name);
const click = (id, name) => { head(id, name).firstChild.click(); return cells(id, head(id, name).cellIndex); };
const filter = (id, text) => {
  const input = document.querySelector(`[data-for="${id}"]`);
  input.value = text;
  input.dispatchEvent(new Event("input"));
  return [cells(id, 2), document.querySelector(`[data-count="${id}"]`).textContent]; };
const seen = {
  up: click("t-runs", "peak MiB"), down: click("t-runs", "peak MiB"), sorted: head("t-runs", "peak MiB").ariaSort,
  names: click("t-settings", "method"), some: filter("t-runs", "BIAS pets"),
  none: filter("t-runs", "bias nowhere"), all: filter("t-runs", ""),
  network: performance.getEntriesByType("resource").map((entry) => entry.name) };
document.body.setAttribute("data-seen", JSON.stringify(seen));
</script>
"""


@pytest.fixture
def runs(write_result, tmp_path):
    for dataset in ("pets", "dtd"):
        for method, peak in (("s2a", 90.0), ("bias", 1100.0), ("linear", 9.5)):
            for seed in range(3):
                folder = write_result(
                    f"{dataset}/{method}/{seed}", dataset=dataset, method=method, seed=seed, top1=80 + seed, peak=peak
                )
                lines = [json.dumps({"epoch": e, "val_top1": 50.0 + e}) for e in range(1, 5)]
                (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"epoch": 5, "val_t']))
    write_result("measured", method="bias", kind="measured-cuda", peak=950.0, seed=7)
    write_result("xss", dataset="<script>alert(1)</script>", method="full", status="failed")
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "result.json").write_text("{")
    return tmp_path / "runs"


def test_the_page_is_whole_and_escaped(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(runs), f"out={out}"]) == 0
    assert "20 results, 1 that can't be read" in capsys.readouterr().out
    page = out.read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert "it went wrong" in page and "runs/xss" in page and "runs/broken/result.json" in page
    assert (
        page.count('<div class="panels">') == 3
        and not re.search(r"""(src|href)=["'](?!#)""", page)
        and "@import" not in page
    )
    assert "environment" in page and "2.6.0" in page
    assert not list(tmp_path.glob(".page.html*")), "no litter"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.slow
def test_sorting_and_filtering_in_a_browser(runs, tmp_path):
    page = tmp_path / "page.html"
    main(["report", str(runs), f"out={page}"])
    page.write_text(page.read_text().replace("</html>", f"{CLICKS}</html>"))
    command = [CHROMIUM, *HEADLESS, f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr
    seen = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    peaks = ["9.5"] * 6 + ["90.0"] * 6 + ["950"] + ["1,100"] * 6
    assert seen["up"] == [*peaks, "–"] and seen["down"] == [*reversed(peaks), "–"], "by size, the missing one last"
    assert seen["sorted"] == "descending" and seen["names"] == sorted(seen["names"])
    assert seen["some"] == [["bias"] * 4, "4 of 20 lines"] and seen["none"] == [[], "0 of 20 lines"]
    assert len(seen["all"][0]) == 20 and seen["network"] == []
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120, check=True)
    assert shot.stat().st_size > 50_000


WIDTHS = (390, 768, 1440)
PLACES = """
<script>addEventListener("load", () => setTimeout(() => {
  const seen = [...document.querySelectorAll("iframe")].map((one) =>
    [...one.contentDocument.querySelectorAll(".bars *")].filter((e) => ["name", "bar", "peak"].includes(e.classList[0]))
      .map((e) => { const { left, top, right, bottom } = e.getBoundingClientRect();
        return { kind: e.classList[0], text: e.textContent, left, top, right, bottom }; }));
  document.body.setAttribute("data-seen", JSON.stringify(seen));
}, 500))</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.slow
def test_each_memory_bar_stands_by_its_own_name_at_any_width(runs, tmp_path):
    main(["report", str(runs), f"out={tmp_path / 'page.html'}"])
    frames = "".join(
        f'<iframe src="page.html" style="width: {w}px; height: 900px; border: 0"></iframe>' for w in WIDTHS
    )
    (tmp_path / "all.html").write_text(f"<body>{frames}{PLACES}</body>")
    flags = [*HEADLESS, "--allow-file-access-from-files", "--disable-web-security", "--virtual-time-budget=5000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "all.html").as_uri()]
    done = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    for width, places in zip(WIDTHS, json.loads(found[1].replace("&quot;", '"')), strict=True):
        names, bars, peaks = ([one for one in places if one["kind"] == kind] for kind in ("name", "bar", "peak"))
        assert [one["text"] for one in names] == ["bias int4", "bias int4", "linear int4", "s2a int4"]
        ends = [*(one["top"] for one in names[1:]), 1e9]
        for name, bar, peak, end in zip(names, bars, peaks, ends, strict=True):
            assert name["right"] < peak["left"] and peak["bottom"] <= end
            assert abs(name["top"] - peak["top"]) < 8, "its name and its peak share a line"
            if width <= 768:
                assert name["bottom"] <= bar["top"] and bar["bottom"] <= end, (
                    "its bar is below them, above the next name"
                )
            else:
                assert name["right"] < bar["left"] < bar["right"] < peak["left"] and abs(name["top"] - bar["top"]) < 8


def test_runs_are_chosen_and_bad_input_is_one_line(runs, tmp_path, capsys):
    assert main(["report", str(runs), "method=bias", f"out={tmp_path / 'p.html'}"]) == 0
    assert main(["report", str(runs), "out=/nowhere/p.html"]) == 2
    assert "out=/nowhere/p.html: can't be written" in capsys.readouterr().err
    assert main(["report", str(runs / "broken")]) == 2
    assert "no finished runs below" in capsys.readouterr().err
    assert main(["report", str(runs), "ouf=x.html"]) == 2
    assert "did you mean 'out'?" in capsys.readouterr().err


def test_only_failed_runs_make_a_page(write_result, tmp_path):
    write_result("a", status="oom")
    html_report.write([str(tmp_path / "runs")], {}, tmp_path / "p.html")
    assert "1 oom" in (tmp_path / "p.html").read_text()


def test_the_frontier_holds_what_nothing_beats():
    points = pd.DataFrame({"peak_mib": [10, 10, 20, 30, 40], "score_mean": [50.0, 60.0, 55.0, 70.0, 70.0]})
    assert plots.frontier(points, "peak_mib").index.tolist() == [1, 3]


def test_measured_and_predicted_have_frontiers_of_their_own(make_result):
    kinds = [
        ("s2a", "predicted", 50.0),
        ("bias", "predicted", 80.0),
        ("full", "measured-cuda", 90.0),
        ("linear", "measured-cuda", 40.0),
    ]
    rows = summary.table(
        aggregate.from_results([make_result(method=m, kind=k, peak=p, top1=60 + p / 10) for m, k, p in kinds])
    )
    figure, _ = plots.pareto(rows, "peak_mib")
    lines = {line.get_linestyle() for line in figure.axes[0].lines}
    assert {"-", "--"} <= lines
    fills = {line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() not in (None, "None", "")}
    assert "none" in fills and len(fills) > 1
    plots.plt.close(figure)


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_table_draws_a_file(runs, tmp_path, kind, capsys):
    path = tmp_path / f"figure.{kind}"
    assert main(["table", str(runs), "rows=method", f"figure={path}"]) == 0
    assert path.read_bytes()[:5] == {"svg": b"<?xml", "png": b"\x89PNG\r", "pdf": b"%PDF-"}[kind]


def test_a_figure_of_nothing_or_of_another_kind(write_result, tmp_path):
    write_result("a")
    rows = summary.table(aggregate.load([tmp_path / "runs"]))
    with pytest.raises(UserError, match="nothing to draw"):
        plots.save(rows, tmp_path / "a.svg")
    with pytest.raises(UserError, match="ends in .svg, .png or .pdf"):
        plots.save(rows, Path("a.gif"))


def test_plans_are_shown(write_result, tmp_path):
    choice = {"words": [], "needed_mib": 80.0, "predicted_seconds": 1.0, "measured_seconds": None, "fidelity": None}
    plan = {
        "settings": {"optim.micro_batch": 4},
        "asked": {"optim.micro_batch": None},
        "available_mib": 90.0,
        "batch": 64,
        "device": "cpu",
        "seconds": 9.0,
        "choices": [choice | {"about": "micro-batches of 4", "why": "the <fastest>"}],
    }
    for seed in (0, 1):  # planned otherwise, but for the same words
        folder = write_result(f"planned/{seed}", seed=seed, optim__micro_batch=4 + seed, budget="90MiB")
        found = json.loads((folder / "result.json").read_text()) | {"plan": plan}
        (folder / "result.json").write_text(json.dumps(found))
    frame = aggregate.load([str(tmp_path / "runs")])
    page = html_report.html(frame, [], tmp_path)
    assert page.count("<td>micro-batches of 4</td>") == 2 and "the &lt;fastest&gt;" in page
    rows = summary.table(frame)
    assert len(rows) == 1 and rows["quant"].tolist() == ["planned"]
