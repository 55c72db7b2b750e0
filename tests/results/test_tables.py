"""Tables from result.json files: what shares a row, what is shown, what is left out."""

import io
import json

import pandas as pd
import pytest

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import natural
from s2a_cli.results import aggregate, summary


def rows_of(*results):
    return summary.table(aggregate.from_results(results))


def test_seeds_share_a_row_and_other_runs_do_not(make_result):
    rows = rows_of(*(make_result(seed=s, top1=90.0 + s) for s in range(3)), make_result(method="bias", top1=88.0))
    assert list(rows["method"]) == ["bias", "s2a"]
    s2a = rows.iloc[1]
    assert (s2a["n"], s2a["top1_mean"], s2a["top1_std"]) == (3, 91.0, 1.0)
    assert (s2a["trainable"], s2a["percent"], s2a["peak_mib"], s2a["images_per_s"]) == (51_000, 0.93, 100.0, 33.0)
    assert (s2a["x_full"], s2a["x_full_against"], s2a["status"]) == (5.0, "predicted", "ok")
    assert rows.iloc[0]["n"] == 1 and pd.isna(rows.iloc[0]["top1_std"])


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"optim__batch_size": 32}, "optim.batch_size"),
        ({"precision": "bf16"}, "precision"),
        ({"backbone__image_size": 224}, "backbone.image_size"),
        ({"optim__lr": 3e-3}, "optim.lr"),
        ({"quant__norm": 8}, "quant.norm"),
        ({"method__blocks": "last:6"}, "method.blocks"),
        ({"method__rank": 4}, "method.rank"),
        ({"dataset__scale": None}, "dataset.scale"),
    ],
)
def test_runs_that_differ_in_a_setting_are_not_averaged_and_it_is_shown(make_result, changes, column):
    rows = rows_of(make_result(), make_result(seed=1, **changes))
    assert list(rows["n"]) == [1, 1]
    assert rows[column].map(str).nunique() == 2
    assert column in summary.readable(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cuda"},
        {"busy": "allow"},
        {"workers": 4},
        {"run_dir": "/x"},
        {"dataset__root": "/y"},
        {"method__lr": 7.0},
    ],
)
def test_what_does_not_change_a_result_does_not_split_a_row(make_result, changes):
    other = make_result(seed=1)
    for key, value in changes.items():
        group, _, name = key.partition("__")
        (other["config"][group] if name else other["config"])[name or group] = value
    rows = rows_of(make_result(), other)
    assert list(rows["n"]) == [2] and list(rows.columns[:5]) == [*aggregate.BASE, "n"]


def test_other_data_or_weights_are_another_row(make_result):
    data, weights = make_result(seed=1), make_result(seed=2)
    data["data"]["revision"], weights["weights"] = "r2", "w2"
    rows = rows_of(make_result(), data, weights)
    assert list(rows["n"]) == [1, 1, 1] and {"data.revision", "weights"} <= set(rows)


def test_settings_that_differ_between_methods_are_shown_when_they_bear_on_the_comparison(make_result):
    rows = rows_of(make_result(optim__lr=1e-2), make_result(method="full", quant="none", optim__lr=1e-4))
    assert "optim.lr" not in rows, "each method has a learning rate of its own"
    rows = rows_of(make_result(), make_result(method="full", quant="none", optim__batch_size=8))
    assert "optim.batch_size" in rows


def test_bits_that_all_families_follow_are_one_column(make_result):
    rows = rows_of(make_result(quant__norm=4), make_result(quant__bits=3, quant__norm=3))
    assert list(rows["quant.bits"]) == [3, 4] and "quant.norm" not in rows


def test_measured_and_predicted_never_share_a_row(make_result):
    rows = rows_of(make_result(), make_result(seed=1, kind="measured-cuda", peak=140.0, top1=94.0))
    assert dict(zip(rows["memory"], rows["peak_mib"])) == {"predicted": 100.0, "measured": 140.0}
    text = summary.readable(rows).set_index("memory")
    assert text.loc["measured", "x"] == "3.57*", "a measured peak against a predicted one is marked"
    assert text.loc["predicted", "x"] == "5.00"
    assert summary.PREDICTED_FULL in summary.render(rows)


def test_a_measured_full_run_is_what_measured_peaks_are_compared_with(make_result):
    full = {"method": "full", "quant": "none", "kind": "measured-cuda"}
    rows = rows_of(
        make_result(kind="measured-cuda"),
        make_result(**full, peak=700.0),
        make_result(**full, peak=9000.0, optim__batch_size=128),
    )
    s2a = rows[rows["method"] == "s2a"].iloc[0]
    assert (s2a["x_full"], s2a["x_full_against"]) == (7.0, "measured")
    assert "*" not in summary.render(rows)


def test_peaks_and_speeds_of_several_devices_are_not_averaged(make_result):
    runs = [make_result(seed=s, kind="measured-cuda", device=f"GPU {s}") for s in range(2)]
    row = rows_of(*runs).iloc[0]
    assert row["n"] == 2 and pd.isna(row["peak_mib"]) and pd.isna(row["images_per_s"])


def test_runs_that_are_not_ok_are_shown_and_not_counted(make_result):
    rows = rows_of(
        make_result(top1=90.0),
        make_result(seed=1, status="oom"),
        make_result(method="full", quant="none", status="oom"),
        make_result(method="bias", status="interrupted"),
    ).set_index("method")
    assert rows["status"].to_dict() == {"bias": "1 interrupted", "full": "1 oom", "s2a": "1 ok, 1 oom"}
    assert (rows.loc["s2a", "n"], rows.loc["s2a", "top1_mean"], rows.loc["full", "n"]) == (1, 90.0, 0)
    text = summary.readable(rows.reset_index()).set_index("method")
    assert text.loc["full", "top-1 %"] == "–" and text.loc["full", "status"] == "1 oom"


def test_only_failed_runs(make_result):
    assert "1 failed" in summary.render(rows_of(make_result(status="failed")))


def test_a_copy_of_a_run_is_not_another_run(write_result, tmp_path):
    write_result("a")
    write_result("b")
    assert list(summary.table(aggregate.load([tmp_path / "runs", tmp_path]))["n"]) == [1]


def test_damaged_results_are_named_and_left_out(write_result, tmp_path, capsys):
    write_result("good")
    for name, content in {
        "cut": '{"schema": 1, "id"',
        "list": "[]",
        "old": '{"schema": 0}',
        "bare": '{"schema": 1}',
        "binary": "\x00",
    }.items():
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "result.json").write_text(content)
    assert len(aggregate.load([tmp_path])) == 1
    said = capsys.readouterr().err
    assert "5 of 6" in said and all(
        f"runs/{name}/result.json" in said for name in ("cut", "list", "old", "bare", "binary")
    )


def test_nothing_to_show_is_bad_input(tmp_path, capsys):
    with pytest.raises(UserError, match="no finished runs below"):
        aggregate.load([tmp_path])
    with pytest.raises(UserError, match="no such folder"):
        aggregate.load([tmp_path / "rnus"])
    with pytest.raises(UserError, match=r"format=latx: expected one of .* \(did you mean 'latex'\?\)"):
        summary.render(pd.DataFrame(), "latx")


@pytest.fixture
def two_datasets(make_result):
    runs = [
        make_result(dataset=d, method=m, seed=s, top1=t + s)
        for d, t in (("pets", 80.0), ("dtd", 60.0))
        for m in ("bias", "s2a")
        for s in (0, 1)
    ]
    return rows_of(*runs[:-2], make_result(dataset="dtd", method="s2a", status="oom"))


def test_pivot_of_methods_and_datasets(two_datasets):
    wide = summary.by_dataset(two_datasets).set_index("method")
    assert wide.loc["bias", ["dtd", "pets", "mean"]].tolist() == ["60.50 ± 0.71", "80.50 ± 0.71", "70.50"]
    assert wide.loc["s2a", ["dtd", "pets", "mean"]].tolist() == ["–", "80.50 ± 0.71", "–"], (
        "no mean over a part of them"
    )
    assert summary.by_dataset(two_datasets[two_datasets["dataset"] == "dtd"]) is None


def test_pivot_keeps_settings_of_a_method_apart(make_result):
    runs = [make_result(dataset=d, optim__lr=lr) for d in ("pets", "dtd") for lr in (1e-3, 2e-3)]
    wide = summary.by_dataset(rows_of(*runs))
    assert list(wide["optim.lr"]) == ["0.001", "0.002"]
    one_each = summary.by_dataset(
        rows_of(make_result(dataset="pets", optim__lr=1e-3), make_result(dataset="dtd", optim__lr=2e-3))
    )
    assert len(one_each) == 1, "a learning rate chosen for each data set is still one method"


def test_csv_reads_back(two_datasets):
    read = pd.read_csv(io.StringIO(summary.render(two_datasets, "csv")))
    assert list(read.columns) == list(two_datasets.columns)
    assert read["top1_mean"].tolist()[0] == 60.5 and read["status"].tolist()[1] == "1 oom"


def test_markdown(two_datasets):
    text = summary.render(two_datasets, "md")
    first, second = text.split("\n\n")[:2]
    assert all(line.startswith(("| ", "|-")) for line in (first + "\n" + second).splitlines())
    assert "60.50 ± 0.71" in first and "mean of top-1 %" in second and "predicted" in first


def test_terminal(two_datasets):
    text = summary.render(two_datasets)
    assert "peak MiB" in text and "MiB, memory of a training step" in text and "1 oom" in text


def test_latex(make_result):
    text = summary.render(rows_of(make_result(dataset="a_b"), make_result(dataset="a_b", seed=1)), "latex")
    assert text.startswith("\\begin{tabular}{llllrrrrrlrr}\n\\toprule") and "\\bottomrule" in text
    assert "a\\_b & vit\\_t & s2a & int4 & 90.00 $\\pm$ 0.00 & 2" in text
    assert "top-1 \\%" in text and "±" not in text.split("\n\n")[0]


def test_thousands_of_results(make_result, tmp_path):
    for index in range(2000):
        folder = tmp_path / str(index)
        folder.mkdir()
        run = make_result(dataset=f"d{index % 5}", seed=index // 5 % 4, optim__batch_size=1 + index // 20)
        (folder / "result.json").write_text(json.dumps(run))
    rows = summary.table(aggregate.load([tmp_path]))
    assert len(rows) == 500 and set(rows["n"]) == {4}


def test_labels_have_one_order():
    names = ["0.005", "0.0005", "0.05", "b16", "b8", "a"]
    turned = ["a", "b8", "b16", "0.05", "0.0005", "0.005"]
    expected = ["0.0005", "0.005", "0.05", "a", "b8", "b16"]
    assert sorted(names, key=natural) == sorted(turned, key=natural) == expected
