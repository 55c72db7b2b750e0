"""The small form of benchmarks/cuda/accept.py, end to end on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import accept_page
import accept_summary
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Returns the result and the page of the small form."""
    out = tmp_path_factory.mktemp("accept")
    command = [
        sys.executable,
        str(ROOT / "benchmarks/cuda/accept.py"),
        "--device",
        "cpu",
        "--tiny",
        f"out={out}",
        "name=small",
        "minutes=30",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {path.name for path in out.iterdir()} == {"small.json", "small.md", "small.log"}
    return json.loads((out / "small.json").read_text()) | {
        "page": (out / "small.md").read_text(),
        "progress": done.stderr,
    }


@pytest.mark.slow
@pytest.mark.xdist_group("accept")  # `small` is made once
def test_the_small_form_does_all_parts(small):
    assert small["dropped"] == small["not_predicted"] == small["not_started"] == [] and not accept_page.failures(small)
    pytest.importorskip("triton")
    assert small["summary"]["kernels"]["calls"] > 30
    assert max(small["summary"]["kernels"]["of_limit"].values()) <= 1
    [race] = small["speed"]
    assert all(row["images_per_second"] > 0 for row in race["rows"])
    host = {entry["row"]: entry for entry in small["host"]}
    assert (
        host["T2-int4"]["own_operators"] > 0 == host["bias"]["own_operators"]
        and host["T2-int4"]["operators"] > host["bias"]["operators"]
    )
    assert host["bias"]["wall_ms"] >= host["bias"]["issued_ms"] > 0


@pytest.mark.slow
@pytest.mark.xdist_group("accept")  # `small` is made once
def test_the_small_form_predicts_what_the_tracker_counts(small):
    done = [entry for entry in small["memory"] if not entry["refused"]]
    assert len(done) == len(small["memory"]) - 2 == 18  # full fine-tuning of a ResNet takes no pieces
    for entry in done:
        assert entry["measured"]["kind"] == "tracked-cpu"
        assert abs(accept_summary.error(entry)) < 0.001, entry["name"]


@pytest.mark.slow
@pytest.mark.xdist_group("accept")  # `small` is made once
def test_the_small_form_presents_nothing_as_cudas(small):
    page = small["page"]
    assert page.startswith("# Acceptance, small form on a CPU: no figure here is of a CUDA device\n")
    assert "max_memory_allocated" not in page and "peak, measured" not in page and "(measured" not in page
    assert "tracked on CPU tensors" in page and "## Speed: vit_micro, fp32, on a CPU, not CUDA" in page
    assert "tasks/min" in small["progress"] and " left" in small["progress"]
