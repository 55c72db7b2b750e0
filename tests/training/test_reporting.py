"""The page of one run: its figures, its mistakes as pictures, and nothing wider than a phone."""

from __future__ import annotations

import html as html_module
import json
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest

from s2a_cli.cli.main import main
from s2a_cli.config.compose import compose, recompose
from s2a_cli.config.settings import plain
from s2a_cli.results import multi_label, record, run_report
from s2a_cli.results.evaluation import Answers, Evaluation
from s2a_cli.results.multi_label import MultiLabelEvaluation
from s2a_cli.results.run_report import SHOWN, Uses, html, least_certain, most_confident_mistakes
from s2a_cli.training import reporting

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1440, 768, 390)
WIDER = """
<script>addEventListener("load", () => {
  const width = document.documentElement.clientWidth;
  const within = (e, of) => e.closest(of) && !e.matches(of);
  const wide = [...document.querySelectorAll("body *")].filter(
    (e) => !within(e, ".scroll, .matrix") && !within(e, "svg") && e.getBoundingClientRect().right > width + 1);
  document.body.setAttribute("data-wide", wide.map((e) => e.tagName + "." + e.className).join(" ") || "nothing");
})</script>
"""


def test_what_is_shown_is_the_most_and_the_least_certain():
    draw = np.random.default_rng(0)
    targets, predicted = draw.integers(0, 3, 200), draw.integers(0, 3, 200)
    answers = Answers([f"{n}.png" for n in range(200)], targets, predicted, draw.random(200), None, 1.0)
    evaluation = Evaluation("run", "id", "data", ["a", "b", "c"], answers, [])
    mistakes, uncertain = most_confident_mistakes(evaluation), least_certain(evaluation)
    wrong = sorted(answers.confidence[targets != predicted])
    assert [one.probability for one in mistakes] == wrong[: -SHOWN - 1 : -1]
    assert all(one.said != one.truth == "abc"[targets[one.place]] for one in mistakes)
    assert [one.probability for one in uncertain] == sorted(answers.confidence)[:SHOWN]


def test_of_several_labels_the_one_furthest_from_right_counts():
    logits = np.array([[3.0, -3.0], [-2.0, 0.1], [5.0, 5.0]])
    targets = np.array([[1, 0], [1, 0], [1, 0]])
    evaluation = MultiLabelEvaluation("run", "id", "data", ["a", "b"], list("xyz"), targets, logits, 1.0, [])
    assert [(one.place, one.said, one.truth) for one in most_confident_mistakes(evaluation)] == [
        (2, "b", "a"),
        (1, "a", "a"),
    ]
    assert next((one.place, one.said) for one in least_certain(evaluation)) == (1, "b")


def test_figures_without_any_label_are_no_figures():
    zeros = np.zeros((3, 2))
    evaluation = MultiLabelEvaluation("run", "id", "data", ["a", "b"], list("xyz"), zeros, zeros - 1, 1.0, [])
    said = multi_label.text(evaluation.figures())
    assert "no image has a label" in said and "mAP                     – %" in said


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "uses", lambda config, result: None)
        assert main(["report", f"run={finished[0]}", f"out={out}", "device=cpu", "workers=0"]) == 0
    return out


def test_the_page_says_what_the_record_says(page, finished):
    _, result = finished
    text = page.read_text()
    assert f"<b>{result['accuracy']['test_top1']:.2f} %</b>test top-1" in text
    assert "s2a train backbone=vit_micro method=s2a" in text and "dataset.shots=4" in text
    shown = {
        part: text.index(f'id="{part}"') for part in ("curves", "classes", "mistakes", "uncertain", "memory", "again")
    }
    assert list(shown.values()) == sorted(shown.values())
    assert text[shown["uncertain"] : shown["memory"]].count("data:image/jpeg;base64,") == SHOWN
    assert text[shown["mistakes"] : shown["uncertain"]].count('class="wrong"') == SHOWN
    assert text.count('<div class="panels">') == 1 and "training loss" in text and "The most confident mistakes" in text
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", text) and "@import" not in text


def test_a_planned_run_is_done_again_by_the_words_that_asked_for_it(finished, tmp_path, monkeypatch):
    _, result = finished
    before = plain(compose(["budget=900MiB"]))
    asked = {"quant": before["quant"], "optim.micro_batch": None, "cuda_graphs": None, "backbone.weights": "fp32"}
    settings = {"quant": plain(compose(["quant=int8"]))["quant"], "optim.micro_batch": 2, "cuda_graphs": False}
    config = result["config"] | {"budget": "900MiB", "quant": settings["quant"], "cuda_graphs": False}
    config["optim"] = config["optim"] | {"micro_batch": 2}
    choice = dict.fromkeys(("needed_mib", "predicted_seconds", "measured_seconds", "fidelity"))
    choices = [choice | {"about": "micro-batches of 2", "words": ["optim.micro_batch=2"], "why": "the fastest"}]
    plan = {"settings": settings, "asked": asked, "available_mib": 900.0, "batch": 8, "device": "cpu", "seconds": 1.0}
    planned = result | {"config": config, "plan": plan | {"choices": choices}}
    (tmp_path / "result.json").write_text(json.dumps(planned))
    monkeypatch.setattr(reporting, "uses", lambda config, result: None)
    monkeypatch.setattr(reporting, "tested", lambda folder, config: (None, "not here"))
    assert main(["report", f"run={tmp_path}"]) == 0
    shown = re.search("<pre>(.*)</pre>", (tmp_path / "report.html").read_text())
    assert shown, "a command"
    words = shlex.split(html_module.unescape(shown[1]))[2:]
    assert "budget=900MiB" in words and not [word for word in words if "micro_batch" in word or "quant" in word]
    content = record.content(plain(compose(words)), result["data"]["revision"], result["weights"])
    assert content == record.content_of(record.read_result(tmp_path))


def test_a_run_without_its_data_or_its_curves_has_a_page(finished, tmp_path):
    folder, result = finished
    odd = result | {"data": result["data"] | {"name": "<script>alert(1)"}, "memory": None}
    text = html(tmp_path, odd, None, None, "Not tested here: its photos are gone", None)
    assert "<script>alert" not in text and "its photos are gone" in text
    assert "No metrics.jsonl" in text and "it stands in config.yaml" in text and "Not known" in text
    (tmp_path / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + '{"epoch": 2, "val_')
    assert "training loss" in html(tmp_path, result, None, None, "", None)
    (tmp_path / "metrics.jsonl").write_text("[]\n[]\n")
    assert "metrics.jsonl can&#39;t be read: line 1" in html(tmp_path, result, None, None, "", None)


def test_a_run_of_many_classes_has_its_matrix(finished, tmp_path):
    names, draw = [f"class {number}" for number in range(102)], np.random.default_rng(0)
    answers = Answers(
        list(map(str, range(408))), np.arange(408) % 102, draw.integers(0, 102, 408), draw.random(408), None, 1.0
    )
    result = finished[1] | {"data": finished[1]["data"] | {"classes": names}}
    tested = run_report.Tested(Evaluation("run", "id", "data", names, answers, []), [], [], {})
    text = html(tmp_path, result, None, tested, "", None)
    matrix = text[text.index('id="confusion"') : text.index("Most frequent confusions")]
    assert "<image " in matrix and "1 of 2 classes is named" in matrix and ">class 100<" in matrix


def test_no_name_of_memory_has_two_values(finished, tmp_path):
    _, result = finished
    config = recompose(result["config"], ["device=cpu"])
    uses = reporting.uses(config, result)
    assert isinstance(uses, Uses)
    peaks = {"kind": "predicted", "peak_mib": 9.0, "static_mib": 3.0, "kept_mib": 4.0, "full_finetune_peak_mib": 20.0}
    text = html(tmp_path, result | {"memory": peaks}, None, None, "", uses)
    memory = text[text.index('id="memory"') : text.index('id="again"')]
    key, table = memory[: memory.index("<table")], memory[memory.index("<table") :]
    rows = re.findall(r"<tr><td>([^<]*)</td>", table)
    assert "kept for backward, alive then" in rows and "kept at the end of the forward pass" in key
    assert not [row for row in rows if f"</i>{row} " in key], "what the bar and the table both name"


def test_a_page_that_is_not_ours_is_not_replaced(finished, tmp_path, capsys):
    (tmp_path / "mine.html").write_text("mine")
    assert main(["report", f"run={finished[0]}", f"out={tmp_path / 'mine.html'}"]) == 2
    assert main(["report", f"run={tmp_path / 'none'}"]) == 2
    said = capsys.readouterr().err
    assert "--force overwrites it" in said and "no result.json there" in said


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.slow
def test_nothing_is_wider_than_a_phone(page, finished, tmp_path):
    many = tmp_path / "many.html"
    assert main(["report", str(finished[0]), f"out={many}"]) == 0
    frames = []
    for name, text in (("one", page.read_text()), ("many", many.read_text())):
        (tmp_path / f"{name}_seen.html").write_text(text.replace("</html>", f"{WIDER}</html>"))
        frames += [
            f'<iframe src="{name}_seen.html" style="border: 0; width: {w}px; height: 2000px"></iframe>' for w in WIDTHS
        ]
    collect = """<script>addEventListener("load", () => setTimeout(() => document.body.setAttribute("data-seen",
      [...document.querySelectorAll("iframe")].map((one) => one.contentDocument.body.getAttribute("data-wide"))
      .join("|")), 500))</script>"""
    (tmp_path / "all.html").write_text(f"<body>{''.join(frames)}{collect}</body>")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--disable-web-security",
        "--window-size=1500,2000",
    ]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, (tmp_path / "all.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    assert found[1] == "|".join(["nothing"] * len(frames))
