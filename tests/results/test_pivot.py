"""Tables with chosen rows and columns: what is averaged, what is said, what is called better."""

import io
import shutil
import subprocess

import pandas as pd
import pytest
from scipy.stats import ttest_rel

from s2a_cli.common.errors import UserError
from s2a_cli.results import aggregate, pivot, pivot_text, published, significance


def shown(results, **options):
    return pivot_text.show(aggregate.from_results(results), options)


def grid_of(results, rows="method", cols="dataset", **options):
    return pivot.make(aggregate.from_results(results), rows.split(","), cols.split(",") if cols else [], **options)


@pytest.fixture
def three_seeds(make_result):
    """bias is 2 points above linear on both data sets, and 0.1 points of noise above s2a."""
    tops = {"bias": (90.0, 90.5, 91.2), "linear": (88.0, 88.6, 89.1), "s2a": (90.1, 90.2, 91.1)}
    return [
        make_result(dataset=d, method=m, seed=s, top1=top + shift)
        for d, shift in (("pets", 0.0), ("dtd", -20.0))
        for m, found in tops.items()
        for s, top in enumerate(found)
    ]


def test_cells_are_means_over_seeds_and_means_are_over_data_sets(three_seeds):
    grid = grid_of(three_seeds)
    cell = grid.cells.loc[("bias", "pets")]
    assert (round(cell["mean"], 3), round(cell["std"], 3), cell["n"]) == (90.567, 0.603, 3)
    assert grid.mean_of(("bias",), grid.means[0]) == pytest.approx(80.567, abs=1e-3)
    text = pivot_text.table(grid)[0].text.set_index("method")
    assert text.loc["linear", "pets"] == "88.57 ± 0.55" and text.loc["linear", "peak MiB ↓"] == "~100"
    assert text.loc["bias", "trainable M ↓"] == "0.051"


def test_a_difference_within_noise_is_no_win(three_seeds):
    grid = grid_of(three_seeds)
    marks = grid.cells["mark"]
    assert marks["bias", "pets"] == "best≈" and marks["s2a", "pets"] == "≈" and marks["linear", "pets"] == ""
    without = grid_of([r for r in three_seeds if r["config"]["method"]["name"] != "s2a"])
    assert without.cells["mark"]["bias", "pets"] == "best", "told from linear"
    assert "n = 3 runs a cell" in shown(three_seeds, rows="method") and "12 in" not in shown(three_seeds, rows="method")


def test_too_few_pairs_are_said(make_result):
    text = shown(
        [make_result(method=m, seed=s, top1=t + s) for m, t in (("a", 80), ("b", 95)) for s in (0, 1)], rows="method"
    )
    assert "*95.50 ± 0.71 ?" in text and "fewer than 3 pairs" in text


def test_only_runs_of_the_same_seed_and_settings_pair(make_result):
    runs = [make_result(method="a", seed=s, top1=90.0 + s) for s in range(3)]
    assert (
        grid_of([*runs, *(make_result(method="b", seed=s + 3, top1=80.0 + s) for s in range(3))]).cells["mark"].max()
        == "best?"
    )
    other = [make_result(method="b", seed=s, top1=80.0 + s / 7, optim__batch_size=8) for s in range(3)]
    assert grid_of([*runs, *other]).cells["mark"].max() == "best?", "another batch size"


def test_the_p_value_is_that_of_scipy():
    a, b = pd.Series([90.0, 91.0, 93.5, 90.2]), pd.Series([89.0, 90.5, 91.0, 90.6])
    found = significance.difference(a, b)
    assert found.p == pytest.approx(ttest_rel(a, b).pvalue) and found.n == 4 and found.mean == pytest.approx(0.9)
    assert found.error == pytest.approx((a - b).std() / 2)
    assert significance.difference(a, a).p == 1.0
    assert significance.difference(a + 1, a).p == 0.125, "the same difference four times: the sign test"
    assert significance.difference(a, b[:2]).n == 2 and significance.verdict(significance.difference(a, b[:2]).p) == "?"


def test_holm_is_a_step_down_correction():
    assert significance.holm([0.01, 0.04, 0.03, float("nan")])[:3] == pytest.approx([0.03, 0.06, 0.06])


def test_reference_gives_mean_paired_differences(make_result):
    gaps = (0.1, -0.3, 0.4)
    runs = [make_result(quant="none", seed=s, top1=90.0 + s) for s in range(4)]
    runs += [make_result(quant="int4", seed=s, top1=90.0 + s + gap) for s, gap in enumerate(gaps)]
    text = shown(runs, rows="quant", cols="dataset", reference="none")
    assert "91.07 (+0.07 ± 0.20, 3) ≈" in text and "same dataset, backbone, method, seed" in text
    with pytest.raises(UserError, match=r"reference=nnoe: no such row; .*\(did you mean 'none'\?\)"):
        shown(runs, rows="quant", reference="nnoe")


def test_a_row_without_a_pair_in_its_reference_says_so(make_result):
    runs = [make_result(method="bias", quant="none", seed=seed, top1=80.0 + seed) for seed in range(3)]
    oom = make_result(method="s2a", status="oom")
    assert "81.00 (no pairs)" in shown([*runs, oom], rows="method", reference="s2a"), "the reference never finished"
    other = make_result(backbone__name="vit_b", method="s2a")
    text = shown([*runs, other], rows="backbone,method", reference="bias")
    assert "90.00 (no pairs)" in text, "this backbone has no reference"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim__batch_size": 8}, "optim.batch_size: 8 (method=bias); 64 (method=s2a)"),
        ({"precision": "bf16"}, "precision: bf16 (method=bias); fp32 (method=s2a)"),
        ({"backbone__image_size": 224}, "backbone.image_size: 112 (method=s2a); 224 (method=bias)"),
        ({"device": "GPU"}, "environment.device: GPU (method=bias); cpu (method=s2a)"),
        ({"quant": "int8"}, "quant: int4 (method=s2a); int8 (method=bias)"),
    ],
)
def test_what_differs_and_is_not_shown_is_said(make_result, changes, said):
    assert said in shown([make_result(), make_result(method="bias", **changes)], rows="method")


def test_unlike_runs_in_a_cell_are_marked(make_result):
    runs = [make_result(optim__lr=1e-3), make_result(optim__lr=2e-3, top1=92.0)]
    text = shown(runs, rows="method")
    assert "91.00 ± 1.41†" in text and "optim.lr: 0.001, 0.002" in text
    assert "†" not in shown(runs, rows="method,optim.lr")


def test_without_words_for_rows_unlike_runs_are_not_averaged(make_result):
    runs = [make_result(seed=s, optim__lr=lr, top1=90.0 + s) for s in (0, 1) for lr in (1e-3, 2e-3)]
    text = pivot_text.show(aggregate.from_results(runs), {"value": "test_top1"})
    assert "†" not in text and "optim.lr" in text.splitlines()[0] and text.count("90.50 ± 0.71") == 2
    assert "optim.lr" in pivot_text.show(aggregate.from_results(runs), {}).splitlines()[0]


def test_settings_of_one_dataset_under_a_mean_over_datasets_are_said(make_result):
    runs = [make_result(dataset=name, optim__batch_size=size) for name, size in (("a", 64), ("b", 16))]
    text = pivot_text.show(aggregate.from_results(runs), {})
    assert "mean of top-1 %" in text and "optim.batch_size: 16 (dataset=b); 64 (dataset=a)" in text


def test_seeds_that_differ_are_said_and_counted(make_result):
    text = shown([*(make_result(seed=s) for s in range(2)), make_result(method="bias")], rows="method")
    assert "90.00 ± 0.00 (2)" in text and "90.00 (1)" in text and "seeds: 0 in 1 cell; 0 1 in 1 cell" in text


def test_group_means_weigh_data_sets_and_groups(make_result):
    runs = [make_result(dataset=d, top1=t) for d, t in (("pets", 90.0), ("dtd", 60.0), ("svhn", 30.0))]
    grid = grid_of([*runs, make_result(dataset="extra", top1=1.0)], groups="photos:pets,dtd/digits:svhn")
    found = {mean.title: grid.mean_of(("s2a",), mean) for mean in grid.means}
    assert found == {"photos": 75.0, "digits": 30.0, "mean of data sets": 60.0, "mean of groups": 52.5}
    assert any("extra" in note for note in grid.notes)


def test_a_part_of_the_data_sets_has_no_mean(make_result):
    runs = [make_result(dataset=d, method=m) for d in ("pets", "dtd") for m in ("bias", "s2a")][:-1]
    text = shown(runs, rows="method")
    assert "s2a lacks dtd" in text
    assert pivot_text.table(grid_of(runs))[0].text.set_index("method").loc["s2a", ["dtd", "mean"]].tolist() == [
        "–",
        "–",
    ]
    vtab = shown([make_result(dataset=d) for d in ("pets", "dtd")], rows="method", groups="vtab")
    assert "natural: no mean, 5 of 7 data sets are missing" in vtab


def test_data_sets_of_another_metric_are_named_and_in_no_mean(make_result):
    runs = [make_result(dataset=d, method=m) for d in ("pets", "dtd", "voc") for m in ("bias", "s2a")]
    for run in runs:
        if run["data"]["name"] == "voc":
            run["accuracy"] |= {"test_top1": None, "test_map": 60.0}
    text = shown(runs, rows="method", cols="dataset")
    assert "voc: no test top-1 %, and in no mean; value=test_map shows test mAP %." in text and "lacks" not in text
    assert [mean.datasets for mean in grid_of(runs).means] == [("dtd", "pets")]
    assert "dtd, pets: no test mAP %" in shown(runs, rows="method", cols="dataset", value="test_map")
    assert "voc: no test top-1 %" in shown(runs, rows="dataset", cols="method")
    assert "in no mean" not in shown(runs, rows="method", value="peak")


def test_failed_cells_say_so(make_result):
    text = shown([make_result(), make_result(method="full", quant="none", status="oom")], rows="method")
    assert "1 oom (full, pets)" in text and " 1 oom " in text


def test_only_failed_runs_are_a_table(make_result):
    runs = [make_result(method=m, dataset=d, status="failed") for m in ("bias", "s2a") for d in ("pets", "dtd")]
    for options in ({"rows": "method"}, {"rows": "method", "reference": "s2a"}, {"rows": "method", "format": "csv"}):
        assert "failed" in shown(runs, **options) or "–" in shown(runs, **options)


def test_memory_is_marked_as_predicted_and_kinds_are_not_averaged(make_result):
    runs = [
        make_result(peak=100.0),
        make_result(seed=1, kind="measured-cuda", peak=140.0),
        make_result(method="bias", peak=90.0),
    ]
    text = shown(runs, rows="method", value="peak")
    assert " 140.0\n" in text and " ~90.0" in text and "the measured ones are shown" in text
    assert "do not compete" in text and "memory: measured (method=s2a); predicted (method=bias)" in text
    assert "*~90.0" in shown([make_result(), make_result(method="bias", peak=90.0)], rows="method", value="peak")


def test_predicted_figures_are_never_shown_bare(make_result):
    runs = [
        make_result(dataset=d, method=m, seed=s, peak=p)
        for d in ("pets", "dtd")
        for m, p in (("a", 90.0), ("b", 80.0))
        for s in range(3)
    ]
    grid = grid_of(runs, value="peak")
    assert pivot_text.table(grid)[0].text.set_index("method").loc["a"].tolist() == ["~90.0", "~90.0", "~90.0"]
    table, notes = pivot_text.against_reference(grid, "b")
    assert (
        table.text.set_index("method").loc["a", "all pairs"] == "~90.0 (+10.0 ± 0.0, 6)"
        and pivot_text.PREDICTED in notes
    )


def test_data_sets_in_rows_compete_along_the_row(make_result):
    runs = [
        make_result(dataset=d, method=m, top1=t) for d in ("pets", "dtd") for m, t in (("bias", 80.0), ("s2a", 90.0))
    ]
    table = pivot_text.table(grid_of(runs, rows="dataset", cols="method"))[0]
    assert list(table.text) == ["dataset", "bias", "s2a"] and list(table.text["dataset"]) == ["dtd", "pets", "mean"]
    assert table.bold == {(0, "s2a"), (1, "s2a"), (2, "s2a")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "metod"}, r"rows=metod: no such key .*did you mean 'method'"),
        ({"rows": "optim.batchsize"}, r"did you mean 'optim.batch_size'"),
        ({"value": "peek"}, r"value=peek: expected one of .*did you mean 'peak'"),
        ({"groups": "vtb"}, r"groups=vtb: .*did you mean 'vtab'"),
        ({"rows": "method", "cols": "method"}, "a key stands there twice"),
        ({"format": "latx"}, r"did you mean 'latex'"),
        ({"against": "none.csv"}, r"against=none.csv: can't be read"),
        ({"against": "published", "value": "x"}, "published figures are there for test_top1, trainable"),
        ({"rows": ""}, "expected keys"),
    ],
)
def test_wrong_words(make_result, options, message):
    runs = [make_result(dataset=d, method=m) for d in ("pets", "dtd") for m in ("bias", "s2a")]
    with pytest.raises(UserError, match=message):
        shown(runs, **options)


def test_runs_are_kept_by_key(make_result):
    frame = aggregate.from_results(
        [make_result(dataset=d, optim__batch_size=b) for d in ("pets", "dtd") for b in (8, 16)]
    )
    assert len(aggregate.select(frame, {"dataset": "pets", "optim.batch_size": "8,16"})) == 2
    comma = aggregate.from_results([make_result(dataset=d) for d in ("pets", "pets, new (copy)")])
    assert list(aggregate.select(comma, {"dataset": "pets, new (copy)"})["data.name"]) == ["pets, new (copy)"]
    with pytest.raises(UserError, match=r"dataset=pet: no such run; there is dtd, pets \(did you mean 'pets'\?\)"):
        aggregate.select(frame, {"dataset": "pet"})
    with pytest.raises(UserError, match=r"row=method: .*did you mean 'rows'"):
        aggregate.select(frame, {"row": "method"}, ("rows", "cols"))


def vit_b(make_result, images=1000, **changes):
    found = make_result(dataset="cifar100", method="bias", quant="none", backbone__name="vit_b", top1=73.0, **changes)
    found["config"]["backbone"] |= {"image_size": 224, "timm": "vit_base_patch16_224.orig_in21k"}
    found["config"]["optim"]["epochs"] = 100
    found["data"] |= {"train": images - 200, "val": 200}
    return found


def test_published_figures_beside_ours(make_result):
    text = shown([vit_b(make_result)], rows="method", against="published")
    assert "72.80" in text and "+0.20" in text and "V-PETL Bench" in text and "[1]" in text
    assert "training images: 1,000, not the benchmark's own" in text
    changed = shown([vit_b(make_result, precision="bf16")], rows="method", against="published")
    assert "precision bf16 (published: fp32)" in changed
    assert "No published figure fits" in shown([vit_b(make_result, images=50_000)], rows="method", against="published")


def test_published_means_of_vtab(make_result):
    runs = [vit_b(make_result) for _ in published.EVERY]
    for run, task in zip(runs, sorted(published.EVERY), strict=True):
        run["data"]["name"], run["id"] = f"vtab_{task}", task
    text = shown(runs, rows="method", groups="vtab", against="published")
    assert "vtab_natural" in text and "vtab_mean19" in text and "vtab_group_mean" in text
    assert "+10.95" in text, "73 everywhere, less 62.05"
    assert "vtab_structured" in shown(runs[:-1], rows="method", groups="vtab", against="published").split("Against")[1]
    assert "vtab_mean19" not in shown(runs[:-1], rows="method", groups="vtab", against="published")


def test_published_figures_tuned_for_each_task(make_result):
    """16 methods on the 19 tasks, and their means."""
    lines = published.load("published")
    tuned = lines[lines["protocol"] == "VTAB-1k, tuned"].pivot(index="method", columns="dataset", values="value")
    assert (
        len(tuned) == 16 and not tuned.isna().any(axis=None) and {"bitfit", "fact_tt", "layernorm"} <= set(tuned.index)
    )
    tasks = {group: [f"vtab_{task}" for task in found] for group, found in published.vtab.VTAB.items()}
    assert set(tuned.columns) - set(published.VTAB_MEANS[published.EVERY].values()) == {
        *(task for found in tasks.values() for task in found),
        *(f"vtab_{group}" for group in tasks),
    }
    means = pd.DataFrame({group: tuned[found].mean(axis=1) for group, found in tasks.items()})
    assert (means - tuned[[f"vtab_{group}" for group in tasks]].to_numpy()).abs().max(axis=None) < 0.0051
    assert (means.mean(axis=1) - tuned["vtab_group_mean"]).abs().max() < 0.0051
    text = shown([vit_b(make_result)], rows="method", against="published")
    assert "75.10" in text and "-2.10" in text and "OSU-MLB" in text and "[2]" in text


def test_published_figures_of_partial_k_are_of_one_block(make_result):
    def shown_of(k):
        runs = [vit_b(make_result) for _ in published.EVERY]
        for run, task in zip(runs, sorted(published.EVERY), strict=True):
            run["data"]["name"], run["id"] = f"vtab_{task}", task
            run["config"]["method"] = {"name": "partial", "lr": 1e-4, "k": k}
        return shown(runs, rows="method", groups="vtab", against="published")

    assert "69.44" in shown_of(1) and "method.k" not in shown_of(1).split("Against")[1]
    assert "method.k 2 (published: 1)" in shown_of(2)


def test_users_add_published_figures(make_result, tmp_path):
    path = tmp_path / "mine.csv"
    line = dict(
        zip(published.COLUMNS, ["My paper", "mine", "vit_t", "pets", "s2a", "top1", 91.5, "%", ""], strict=True)
    )
    pd.DataFrame([line]).to_csv(path, index=False)
    text = shown([make_result()], rows="method", against=str(path))
    assert "91.50" in text and "-1.50" in text and "[1] My paper" in text
    path.write_text("source,value\na,1\n")
    with pytest.raises(UserError, match="no column protocol, backbone"):
        shown([make_result()], rows="method", against=str(path))


def test_csv_has_numbers(three_seeds):
    read = pd.read_csv(io.StringIO(shown(three_seeds, rows="method", cols="dataset", format="csv")))
    assert list(read)[:6] == ["method", "dataset", "value", "mean", "std", "n"] and len(read) == 6
    assert read["mean"][1] == pytest.approx(90.5667, abs=1e-3) and set(read["memory"]) == {"predicted"}


def test_html_escapes(make_result):
    text = shown(
        [make_result(dataset="<script>"), make_result(dataset="a", method="b&c")], rows="method", format="html"
    )
    assert "<script>" not in text and "&lt;script&gt;" in text and "b&amp;c" in text


def test_markdown_has_a_bold_best(three_seeds):
    text = shown(three_seeds, rows="method", format="md")
    assert "**90.57 ± 0.60 ≈**" in text and "↑" in text


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
@pytest.mark.slow
def test_latex_compiles(three_seeds, make_result, tmp_path):
    odd = make_result(dataset="a_b&c%", method="x^y~z#{}\\", top1=12.0)
    body = (
        shown([*three_seeds, odd], rows="method", format="latex") + "\n\n" + shown([*three_seeds, odd], format="latex")
    )
    body += "\n\n" + shown([vit_b(make_result)], rows="method", against="published", format="latex")
    (tmp_path / "t.tex").write_text(
        f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\n{body}\n\\end{{document}}"
    )
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "\\textbf{" in body and (tmp_path / "t.pdf").stat().st_size > 1000
