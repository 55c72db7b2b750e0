"""The commands: exit codes, help, errors, and what is printed where."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import s2a_cli.training
from s2a_cli.cli import commands
from s2a_cli.cli.commands import COMMANDS, KINDS
from s2a_cli.cli.main import main
from s2a_cli.common.errors import RunError, UserError
from s2a_cli.config.compose import groups

CONFIGURED = ", ".join(name for name, command in COMMANDS.items() if command.config)


def run(*words, **kwargs):
    return subprocess.run([sys.executable, "-m", "s2a_cli", *words], capture_output=True, text=True, **kwargs)


@pytest.fixture
def training(monkeypatch):
    """Stands in for the module that trains."""
    fake = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "s2a_cli.training.trainer", fake)
    monkeypatch.setattr(s2a_cli.training, "trainer", fake, raising=False)
    return fake


def test_help_names_every_command_and_flag(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        said = capsys.readouterr().out
        assert (
            all(f"\n  {command} " in said for command in COMMANDS)
            and "--completion" in said
            and "--complete " not in said
        )


def test_help_of_train_in_a_process_of_its_own():
    """There nothing has imported the structures before."""
    done = run("train", "method=prompt", "--help")
    assert done.returncode == 0 and "method.rank=8" in done.stdout and not done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_opens_with_three_examples_that_can_be_copied(name, capsys):
    assert main([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == list(COMMANDS[name].examples) and lines[3] == ""
    for line in lines[:3]:
        words = shlex.split(line.split(">")[0])
        assert words[:2] == ["s2a", name]
        if COMMANDS[name].config in (commands.composed, commands.first_of_grid):
            COMMANDS[name].config([word for word in words[2:] if not word.startswith("--")])


def test_help_of_train_lists_every_setting_as_composed(capsys):
    assert main(["train", "method=prompt", "--help"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  method\.rank=8\b", said, re.MULTILINE) and not re.search(
        r"^  method\.prompt", said, re.MULTILINE
    )
    assert re.search(r"^  optim\.epochs=10 +passes over the training images$", said, re.MULTILINE)
    assert all(re.search(rf"^  {group}= +.*{options[-1]}", said, re.MULTILINE) for group, options in groups().items())


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["trian"], f"s2a: trian: no such command; accepted: {', '.join(COMMANDS)} (did you mean 'train'?)"),
        (
            ["train", "--degub"],
            "s2a: --degub: no such flag; accepted: --help, --cfg, --debug, --version, --completion, --force, --once"
            " (did you mean '--debug'?)",
        ),
        (
            ["ls", "backbons"],
            "s2a: ls backbons: expected one of backbones, methods, quants, datasets, experiments"
            " (did you mean 'backbones'?)",
        ),
        (["train", "--cfg"], "s2a: --cfg: expected --cfg job"),
        (["train", "--cfg", "jobs"], f"s2a: --cfg: expected --cfg job behind one of {CONFIGURED}"),
        (["ls", "--cfg", "job"], f"s2a: --cfg: expected --cfg job behind one of {CONFIGURED}"),
        (["--completion", "tcsh"], "s2a: --completion tcsh: expected one of bash, zsh, fish"),
        (["eval"], "s2a: run=DIR is needed once: the folder of a finished run, which `s2a train` prints"),
        (["eval", "run=nowhere"], "s2a: nowhere: no result.json there; give the folder of a run"),
        (["table"], "s2a: no runs/ in this folder; name the folders that hold runs, or make a run with: s2a train"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.err == expected + "\n" and said.out == ""


def test_ls_tells_of_every_option(capsys):
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    options = groups()
    names = [name for group in KINDS.values() for name in options[group]]
    assert [line.split()[0] for line in lines if line.startswith("  ")] == names
    assert all(len(line.split()) > 3 for line in lines if line.startswith("  ")), "each with what it is"
    assert main(["ls", "methods"]) == 0
    assert "low-rank prompt" in capsys.readouterr().out


def test_validate_sums_up(capsys):
    assert main(["validate", "method=bias", "seed=3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ok: backbone=vit_micro method=bias ") and "seed=3" in said and said.count("\n") == 1


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("oom", 1), ("failed", 1), ("interrupted", 1)])
def test_train_prints_the_table_and_the_folder(training, make_result, capsys, status, code):
    asked = []
    training.train = lambda config, **flags: (
        asked.append(config.seed),
        (make_result(status=status), Path("runs/x")),
    )[1]
    assert main(["train", "seed=5"]) == code and asked == [5]
    said = capsys.readouterr()
    assert "peak MiB" in said.out and said.out.endswith("\nrun: runs/x\n")
    assert said.err == ("" if status == "ok" else f"s2a: {status}: it went wrong\n")


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("dataset.root=x: no such folder"), 2, "s2a: dataset.root=x: no such folder\n"),
        (RunError("the loss is nan"), 1, "s2a: the loss is nan\n"),
        (ValueError("odd\nmore"), 1, "s2a: ValueError: odd (--debug shows the traceback)\n"),
        (KeyboardInterrupt(), 130, "s2a: interrupted\n"),
    ],
)
def test_errors_of_a_run(training, capsys, error, code, expected):
    def train(config, **flags):
        raise error

    training.train = train
    assert main(["train"]) == code
    assert capsys.readouterr().err == expected
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            main(["train", "--debug"])


def test_a_damaged_checkpoint_leaves_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    words = ["experiment=smoke", "backbone.checkpoint=cut.safetensors", "device=cpu"]
    assert main(["train", *words, "run_dir=runs/mine"]) == 2
    assert "cut.safetensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cut.safetensors"]


def test_table_reads_runs_of_this_folder(write_result, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_result("a")
    assert main(["table", "format=csv"]) == 0
    here = capsys.readouterr().out
    assert here.startswith("dataset,backbone,method") and here.count("\n") == 2
    assert main(["table", "runs/a", "format=csv"]) == 0
    assert capsys.readouterr().out == here


HEAVY = ("torch", "timm", "pandas", "matplotlib", "numpy")


@pytest.mark.parametrize(
    ("argv", "heavy"),
    [
        ([], (*HEAVY, "hydra", "omegaconf")),
        (["--help"], (*HEAVY, "hydra", "omegaconf")),
        (["--version"], (*HEAVY, "hydra", "omegaconf")),
        (["ls"], (*HEAVY, "hydra", "omegaconf")),
        (["ls", "methods"], (*HEAVY, "hydra", "omegaconf")),
        (["ls", "--help"], (*HEAVY, "hydra")),
        (["--completion", "bash"], (*HEAVY, "hydra")),
        (["--complete"], HEAVY),
    ],
)
def test_light_commands_import_nothing_heavy(argv, heavy, tmp_path):
    script = (
        "import sys; from s2a_cli.cli.main import main\n"
        f"assert main({argv}) == 0\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    environment = os.environ | {"COMP_LINE": "s2a train method=s2a optim."}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "--complete" not in argv or "optim.batch_size=" in done.stdout


@pytest.mark.parametrize(
    "argv",
    [
        ["predict", "run=nope", "images=x"],
        ["predict", "run=runs/a", "images=nope"],
        ["predict", "run=runs/a", "images=x", "gallery=nope/p.html"],
        ["eval", "run=runs/a", "data=nope"],
        ["init", "nope"],
        ["train", "dataset=folder"],
        ["train", "dataset=table"],
        ["train", "run_dir=."],
        ["memory", "fit=8"],
        ["memory", "methd=bias"],
        ["sweep", "optim.epochz=1,2"],
        ["sweep", "sweep.workers=0"],
    ],
)
def test_refusals_import_nothing_heavy(argv, write_result, tmp_path):
    write_result("a")
    script = (
        "import sys; from s2a_cli.cli.main import main\n"
        f"assert main({argv}) == 2\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "[]\n" and done.stderr.count("\n") == 1, done.stdout + done.stderr


def test_installed_command(tmp_path):
    """The console script itself: exit code 2 without a traceback, and with --debug a traceback."""
    script = Path(sys.executable).with_name("s2a")
    if not script.exists():
        pytest.skip("s2a is not installed beside this Python")
    done = subprocess.run([script, "ls", "backbons"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "did you mean 'backbones'" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run([script, "ls", "backbons", "--debug"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_paths_behind_a_key_may_begin_with_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["train", "--cfg", "job", "run_dir=~/runs/mine"]) == 0
    assert f"run_dir: {tmp_path}/runs/mine\n" in capsys.readouterr().out


def test_a_command_takes_sigterm_as_ctrl_c():
    script = (
        "import os, signal, sys\nfrom s2a_cli.cli import main as cli\n"
        "cli._dispatch = lambda argv: os.kill(os.getpid(), signal.SIGTERM)\nsys.argv = ['s2a', 'ls']\n"
        "sys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "s2a: interrupted\n"


def test_a_closed_pipe_ends_quietly(tmp_path):
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; '{sys.executable}' -m s2a_cli ls | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() in ("0", "141") and done.stderr == ""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "s2a_cli", "ls"], stdout=write, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.slow
def test_train_eval_table_from_the_command_line(tmp_path):
    trained = run("train", "experiment=smoke", "device=cpu", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    folder = trained.stdout.strip().splitlines()[-1].removeprefix("run: ")
    record = json.loads((tmp_path / folder / "result.json").read_text())
    assert record["status"] == "ok" and record["config"]["optim"]["epochs"] == 1
    evaluated = run("eval", f"run={folder}", cwd=tmp_path)
    assert evaluated.returncode == 0 and "equal" in evaluated.stdout and "NOT" not in evaluated.stdout, evaluated.stderr
    table = run("table", "format=md", cwd=tmp_path)
    assert table.returncode == 0 and "| digits" in table.stdout and "predicted" in table.stdout


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_marked_interrupted(tmp_path):
    words = ["train", "experiment=smoke", "device=cpu", "optim.epochs=10000", "run_dir=stopped"]
    process = subprocess.Popen(
        [sys.executable, "-m", "s2a_cli", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("epoch 1/"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, "".join(lines) + err
    assert (
        "Traceback" not in err
        and err.endswith("s2a: interrupted: the same line goes on from there\n")
        and "1 interrupted" in out
    )
    assert json.loads((tmp_path / "stopped" / "result.json").read_text())["status"] == "interrupted"
