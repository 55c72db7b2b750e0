"""What the pages show works: blocks run as they stand, or say in a comment what they need; links lead somewhere.

A block that needs a network, a GPU, photos or minutes is not run, but its commands are composed, so that a misspelt
setting fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import NEEDS, PACKAGES, PAGES, ROOT, applied, blocks, commands, name, printed, slug

from s2a_cli.cli.commands import COMMANDS, TABLE
from s2a_cli.cli.main import main

pytestmark = pytest.mark.xdist_group("docs")  # what one page has composed, the next need not import again
SMALL = (  # what is set behind the words of a training
    *("device=cpu", "workers=0", "dataset.shots=4", "optim.epochs=1", "optim.warmup_epochs=0", "optim.batch_size=8"),
)
WORKED = [ROOT / "docs" / "add" / f"{what}.md" for what in ("structure", "operator", "dataset")]
each_page = pytest.mark.parametrize("page", PAGES, ids=name)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to be in, with two short runs in it."""
    folder, before = tmp_path_factory.mktemp("docs"), Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S2A_DATA", str(folder / "data"))
        for quant in ("none", "int4"):
            assert said(["train", "experiment=smoke", "method=bias", f"quant={quant}", "device=cpu"])[0] == 0
        yield folder
    os.chdir(before)


def said(words: list[str]) -> tuple[int, str]:
    """The exit code of a command of s2a and what it says."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(words)
    return code, out.getvalue()


def small(words: list[str]) -> list[str]:
    """The words of a command, so that it takes little time: few images, and the smallest backbone."""
    if words[0] == "memory":
        return [re.sub("^backbone=.*", "backbone=vit_micro", word) for word in words]
    if words[0] != "train" or any(word.startswith("-") for word in words):
        return words
    ours = [word for word in SMALL if "experiment=smoke" not in words or word.startswith("device")]
    replaced = {word.partition("=")[0] for word in ours}
    return [*(word for word in words if word.partition("=")[0] not in replaced), *ours]


_ran: dict[tuple[str, ...], tuple[int, str]] = {}  # a line that stands on two pages is run once


def run(words: list[str]) -> None:
    key = tuple(small(words))
    if key not in _ran:
        _ran[key] = said(list(key))
    code, text = _ran[key]
    assert code == 0, f"s2a {' '.join(words)}\n{text}"


def check(words: list[str]) -> None:
    """Composes a command that is not run."""
    from s2a_cli.config.compose import compose, compose_sweep
    from s2a_cli.config.overrides import expand
    from s2a_cli.sweeps.search import read

    verb, flags, rest = COMMANDS[words[0]], {w for w in words if w[0] == "-"}, [w for w in words[1:] if w[0] != "-"]
    assert flags <= {"--help", *verb.flags}, words
    if words[0] == "search":
        space, *_ = read(rest)
        compose(space.fixed)
        assert {key for key in space.ranges if said(["validate", f"{key}=0"])[1].count("no such setting")} == set()
    elif words[0] == "sweep":
        own = [word for word in rest if word.startswith(("sweep.", "experiment="))]
        grid = compose_sweep(own).grid
        given = {word.partition("=")[0] for word in rest}
        rest = [word for word in rest if not word.startswith("sweep.")]
        ours = [f"{key}={values}" for key, values in grid.items() if key not in given]
        for member in expand([*ours, *rest])[:: -1 if ours else 1][:1]:
            compose(member)
    elif words[0] in ("table", "report"):
        keys = {word.partition("=")[0] for word in rest if "=" in word}
        assert all(key in (*TABLE, "out", "run") or "." in key for key in keys), words
    elif words[0] in ("eval", "export", "predict"):
        assert rest and all("=" in word for word in rest), words
    elif words[0] == "init":
        compose(
            ["dataset=folder", "dataset.root=photos", *(w for w in rest[1:] if not w.startswith(("out=", "minutes=")))]
        )
    else:
        ours = [word for word in words if not word.startswith("config=")]  # a file that `init` writes
        code, text = said([*ours, "--cfg", "job"])
        assert code == 0, text


def other(call: list[str]) -> None:
    """A command of another program: files and extras that it names are there."""
    program, *words = call
    if program in ("test", "python"):
        paths = [word for word in words if word.startswith(("tests/", "benchmarks/", "scripts/"))]
        assert paths or program == "test", call
        assert all((ROOT / path).exists() for path in paths), call
    elif program == "pip":
        named = [extra for word in words for extra in re.findall(r"\[(\w+)\]", word)]
        declared = (ROOT / "pyproject.toml").read_text()
        assert all(f"\n{extra} = [" in declared for extra in named), call


@each_page
def test_every_block_is_run_or_says_why_not(page):
    for block in blocks(page):
        assert block.language in ("sh", "python", "yaml", "diff"), block.place
        assert set(block.needs) <= set(NEEDS), f"{block.place}: {block.needs}"
        assert block.given in ("", "runs", "the files above"), block.place
        if block.language in ("yaml", "diff"):
            assert block.title, f"{block.place}: a block of {block.language} says which file it is of"
    text = page.read_text(encoding="utf-8")
    odd = re.findall(r"^    (?:\$ )?(?:scripts/|s2a |\.venv/|pip |python ).*$", text, re.MULTILINE)
    assert odd == [], f"{name(page)}: commands stand in fences that begin with ```sh"


@pytest.mark.slow
@each_page
def test_blocks_run(page, place, tmp_path):
    for block in blocks(page):
        if block.given == "the files above" or block.title:
            continue
        there = all(need in PACKAGES and importlib.util.find_spec(need) for need in block.needs)
        if block.language == "python" and there:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
            expect(block, out.getvalue())
        if block.language != "sh":
            continue
        for program, *words in commands(block, tmp_path):
            if "-m" in words and "s2a_cli" in words:  # by python or torchrun
                program, words = "s2a", words[words.index("s2a_cli") + 1 :]
            if program != "s2a":
                other([program, *words])
            elif block.needs:
                check(words)
            else:
                if small(words) != words:
                    check(words)
                run(words)


def expect(block, output: str) -> None:
    lines, wanted = output.splitlines(), printed(block)
    for line, end in zip(lines, wanted if len(lines) == len(wanted) else ()):
        assert line.endswith(f" {end}"), f"{block.place}: prints {line}, and says {end}"
    assert not wanted or len(lines) == len(wanted), f"{block.place}: {output}"


DRIVER = """
import json, os, sys
from s2a_cli.cli.main import main
for kind, what in json.load(open(sys.argv[1])):
    if kind == "s2a":
        assert main(what) == 0, what
    else:
        exec(compile(what, "block", "exec"), {"__name__": "__main__"})
    print("\\x1e", flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_worked_examples_work(tmp_path):
    """In a copy of the package, with the files of the pages in it."""
    copy = tmp_path / "copy"
    for folder in ("s2a_cli", "conf"):
        shutil.copytree(ROOT / folder, copy / folder)
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    steps = []
    for page in WORKED:
        for block in blocks(page):
            if block.title:
                path = copy / block.title
                if block.language == "diff":
                    path.write_text(applied(block.text, path.read_text()))
                else:
                    path.write_text(block.text)
            elif block.given and block.language == "sh":
                steps += [(block, ("s2a", small(words))) for _, *words in commands(block, tmp_path)]
            elif block.given:
                steps.append((block, ("python", block.text)))
    (tmp_path / "steps.json").write_text(json.dumps([step for _, step in steps]))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, tmp_path / "steps.json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for (block, (kind, _)), text in zip(steps, done.stdout.split("\x1e\n"), strict=False):
        if kind == "python":
            expect(block, text)
    listed = " ".join(done.stdout.split())
    assert " scale a learned scale" in listed and " shapes drawn discs" in listed


MARKDOWN = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").rglob("*.md"))]


@pytest.mark.parametrize("page", MARKDOWN, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{name(page)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name(page)}: {target}#{anchor}"


def test_pages_that_the_code_names_are_there():
    files = [path for folder in ("s2a_cli", "benchmarks", "scripts", "conf") for path in (ROOT / folder).rglob("*")]
    for path in files:
        if path.suffix in (".py", ".yaml"):
            for page in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8")):
                assert (ROOT / page).exists(), f"{path.relative_to(ROOT)}: {page}"


def test_a_promise_has_its_test():
    """Each test that safety.md names is there: a part of its name, behind its file."""
    text = (ROOT / "docs" / "safety.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)`((?:[:,] `\w+`)*)", text)
    assert len(named) > 20
    for file, names in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        for part in re.findall(r"`(\w+)`", names):
            assert re.search(rf"def test_\w*{part}", source), f"{file}: {part}"


def test_the_readme_is_for_five_minutes():
    assert (ROOT / "README.md").stat().st_size <= 8500


def test_the_figures_are_what_their_script_draws(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "figures" / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    monkeypatch.setattr(draw, "HERE", tmp_path)
    draw.kept()
    draw.batch()
    for drawn in tmp_path.iterdir():
        assert drawn.read_text() == (ROOT / "docs" / "figures" / drawn.name).read_text(), drawn.name


def test_the_site_is_built_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "benchmarks" / "cuda" / "index.html").exists()  # its README
    start = (tmp_path / "site" / "index.html").read_text()
    assert "fonts.googleapis" not in start and "cdn" not in start
