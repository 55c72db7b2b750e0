"""Composition: every option of every group, every experiment, and bad input of every kind."""

import shlex

import hydra
import hydra.version
import pytest
from omegaconf import OmegaConf

from s2a_cli.cli.main import main
from s2a_cli.common.errors import UserError
from s2a_cli.config import loading
from s2a_cli.config.compose import CONF, compose, compose_sweep, groups, recompose
from s2a_cli.config.overrides import expand
from s2a_cli.config.schema import RunConfig

NEEDS = {
    "backbone=timm": ["backbone.name=resnet34.a1_in1k"],
    "dataset=folder": ["dataset.root=photos"],
}
OPTIONS = [f"{group}={name}" for group, names in groups().items() if group != "experiment" for name in names]


def test_default():
    config = compose([])
    chosen = {group: config[group].name for group in ("backbone", "method", "quant", "dataset", "optim")}
    assert chosen == {"backbone": "vit_micro", "method": "s2a", "quant": "int4", "dataset": "digits", "optim": "adamw"}
    assert config.optim.lr == config.method.lr * config.backbone.lr_scale == 0.02
    assert compose(["backbone=vit_t"]).optim.lr == 0.004


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option):
    config = compose([option, *NEEDS.get(option, [])])
    group, name = option.split("=")
    assert config[group].name == ("resnet34.a1_in1k" if option == "backbone=timm" else name)
    assert OmegaConf.get_type(config) is RunConfig


@pytest.mark.parametrize("name", groups()["experiment"])
def test_every_experiment_opens_with_a_command_that_composes(name):
    package, command, about = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()[:3]
    words = shlex.split(command.removeprefix("# "))
    assert package == "# @package _global_" and f"experiment={name}" in words
    assert about.startswith("# ") and about.endswith(".")
    words = [word for word in words if not word.startswith("--")]
    if words[:2] == ["s2a", "sweep"]:
        settings = compose_sweep(words[2:])
        assert settings.grid, "a sweep's experiment brings its grid along"
        grid = expand([*words[2:], *(f"{key}={values}" for key, values in settings.grid.items())])
        assert len({tuple(member) for member in grid}) > 1
        for member in grid[:: max(1, len(grid) // 8)]:
            compose(member)
    assert words[:2] in (["s2a", "train"], ["s2a", "sweep"])
    compose(words[2:])


@pytest.mark.parametrize("group", [group for group in groups() if group != "experiment"])
def test_every_option_says_what_it_is(group):
    for name in groups()[group]:
        first = (CONF / group / f"{name}.yaml").read_text().splitlines()[0]
        assert first.startswith("# ") and len(first) > 10, name


def test_parts_of_a_method_can_be_switched_off_and_tuned():
    off = compose(["method.prompt=false", "method.side=null", "method.bias=false"]).method
    assert off.prompt is None and off.side is None and off.bias is False
    tuned = compose(["method.prompt.rank=4", "method.side.width=16", "method.blocks=last:6"]).method
    assert (tuned.prompt.rank, tuned.side.width, tuned.blocks) == (4, 16, "last:6")
    assert compose(["method.prompt=true"]).method.prompt.rank == 8


def test_a_callers_own_hydra_stays_as_it_is(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: 1")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.2"):
        loading._chosen.cache_clear()
        compose(["method=[lora,side]"])
        assert hydra.compose("mine").a == 1 and hydra.version.getbase().minor == 2


def test_structures_that_words_name_are_composed_once(monkeypatch):
    made, plainly = [], hydra.compose
    monkeypatch.setattr(hydra, "compose", lambda *args, **kwargs: made.append(args) or plainly(*args, **kwargs))
    loading._chosen.cache_clear()
    assert compose(["method=bias", "method=[side,lora]"]).method.name == "lora+side" and len(made) == 1


def test_later_words_win_and_plus_signs_change_nothing():
    assert compose(["seed=1", "+seed=2", "++seed=3"]).seed == 3
    assert compose(["+method=bias"]).method.name == "bias"
    assert compose(["optim.clip_grad=1", "optim.clip_grad=null"]).optim.clip_grad is None


def test_special_values_reach_the_config():
    config = compose(
        ["dataset.root=/my photos/x", "run_dir='a (b)=c,d'", "backbone.kwargs={drop_rate: 0.1}", "optim.lr=1e-3"]
    )
    assert (config.dataset.root, config.run_dir, config.optim.lr) == ("/my photos/x", "a (b)=c,d", 1e-3)
    assert config.backbone.kwargs.drop_rate == 0.1


def test_a_finished_run_composes_again_with_changes():
    stored = OmegaConf.to_container(compose(["seed=7", "method=prompt", "method.rank=3"]))
    again = recompose(stored, ["device=cpu", "optim.batch_size=8"])
    assert (again.seed, again.method.rank, again.device, again.optim.batch_size) == (7, 3, "cpu", 8)
    with pytest.raises(UserError, match="method=bias: a finished run keeps its method"):
        recompose(stored, ["method=bias"])
    with pytest.raises(UserError, match=r"method.rnk: no such setting.*did you mean 'method.rank'"):
        recompose(stored, ["method.rnk=3"])


BAD = [
    # unknown groups, options and keys
    ("methd=bias", "methd: no such setting", "accepted: backbone, method, quant", "(did you mean 'method'?)"),
    ("method=bais", "method=bais: expected one of the ", "(did you mean 'bias'?)"),
    ("backbone=vit-b", "backbone=vit-b: expected one of", "(did you mean 'vit_b'?)"),
    ("experiment=smokee", "experiment=smokee: expected one of", "(did you mean 'smoke'?)"),
    ("method=[bias,ful]", "method=[bias,ful]: expected one of the ", "(did you mean 'full'?)"),
    ("method=[bias,bias]", "method=[bias,bias]: names bias twice"),
    ("method=[bias,side] method.heads=2", "method.heads: no such setting; accepted in method: name, lr, bias, side"),
    ("method=null", "method=null: expected one of"),
    ("+typo=1", "typo: no such setting", "accepted: backbone, method"),
    (
        "++method.rnk=3",
        "method.rnk: no such setting",
        "accepted in method: name, lr, blocks",
        "(did you mean 'method.prompt.rank'?)",
    ),
    ("method.prompt.rnk=4", "method.prompt.rnk: no such setting", "accepted in method.prompt: rank, lr_scale"),
    ("optm.lr=1", "optm.lr: no such setting", "(did you mean 'optim.lr'?)"),
    ("optim.epoch=1", "optim.epoch: no such setting", "(did you mean 'optim.epochs'?)"),
    ("epochs=3", "epochs: no such setting", "(did you mean 'optim.epochs'?)"),
    ("+a.b.c=1", "a.b.c: no such setting"),
    ("hydra.job.name=x", "hydra.job.name=x: Hydra's own settings are not used here"),
    # types and values
    ("optim.epochs=abc", "optim.epochs=abc: expected an integer of at least 1"),
    ("optim.epochs=2.5", "optim.epochs=2.5: expected an integer"),
    ("optim.epochs=0", "optim.epochs=0: expected an integer of at least 1"),
    ("optim.epochs=null", "optim.epochs=null: expected an integer"),
    ("optim.lr=-1", "optim.lr=-1.0: expected a number above 0"),
    ("optim.lr=nan", "optim.lr=nan: expected a number above 0"),
    ("optim.lr=[1]", "optim.lr=[1]: expected a number above 0"),
    ("optim.lr.x=3", "optim.lr={x: 3}: expected a number above 0"),
    ("quant.bits=3.5", "quant.bits=3.5: expected an integer from 1 to 8, or null"),
    ("quant.bits=0", "quant.bits=0: expected an integer from 1 to 8, or null"),
    ("quant.norm=9", "quant.norm=9: expected an integer from 1 to 8, or null"),
    ("quant.softmax=true", "quant.softmax=true: expected an integer from 1 to 8, or null"),
    ("method.prompt.rank=0", "method.prompt.rank=0: expected an integer of at least 1"),
    (
        "method.prompt=3",
        "method.prompt=3: expected its settings (method.prompt.rank, ",
        "), or false",
    ),
    ("method.blocks=last:0", "method.blocks=last:0: expected all or last:K"),
    ("method.bias=maybe", "method.bias=maybe: expected true or false"),
    ("precision=bf61", "precision=bf61: expected one of fp32", "(did you mean 'bf16'?)"),
    ("device=gpu", "device=gpu: expected auto, cpu, cuda, cuda:N or mps"),
    ("dataset.on_corrupt=ignore", "dataset.on_corrupt=ignore: expected one of stop, skip"),
    (
        "dataset=domainnet dataset.domain=clip_art",
        "dataset.domain=clip_art: expected one of clipart",
        "(did you mean 'clipart'?)",
    ),
    ("dataset.shots=0", "dataset.shots=0: expected an integer of at least 1, or null"),
    ("dataset.fraction=1.5", "dataset.fraction=1.5: expected a number above 0, at most 1, or null"),
    ("dataset.scale=[1,0.5]", "dataset.scale=[1.0,0.5]: expected 2 numbers, 0 < smallest <= largest <= 1, or null"),
    ("backbone.mean=[1,2]", "backbone.mean=[1.0,2.0]: expected 3 numbers"),
    ("backbone.image_size=0", "backbone.image_size=0: expected an integer from 1 to 16384, or null"),
    ("seed=-1", "seed=-1: expected an integer from 0 to 2^32 - 1"),
    # settings that exclude each other
    ("compile_budget=0.3", "compile_budget=0.3 is the compiler's: set compile=true too"),
    ("quant.input=8", "quant.input=8 is of recomputed blocks: set quant.recompute=block too"),
    ("quant.blocks={0:{nrom:8}}", "quant.blocks.0.nrom: expected one of lossless, bits, pointwise, "),
    ("quant.blocks={0:{norm:99}}", "quant.blocks.0.norm=99: expected an integer from 1 to 8, or null"),
    ("quant.blocks={0:8}", "quant.blocks={0: 8}: expected settings for each number"),
    ("quant.input=9", "quant.input=9: expected an integer from 1 to 8, or 16 for bfloat16, or null"),
    ("optim.micro_batch=65", "optim.micro_batch=65: expected at most optim.batch_size=64"),
    ("optim.warmup_epochs=10", "optim.warmup_epochs=10.0: expected less than optim.epochs=10"),
    ("dataset.shots=1 dataset.fraction=0.5", "dataset.shots and dataset.fraction exclude each other"),
    ("dataset.test_domain=real", "dataset.test_domain is set without dataset.domain"),
    # what is accepted for nothing that it could mean
    ("seed=1_0", "seed=1_0: 1_0 could mean the number 10 or a text"),
    ("'seed=\"1_0\"'", "seed=1_0: expected an integer from 0 to 2^32 - 1"),
    ("optim.lr=1_0e-3", "1_0e-3 could mean the number 10e-3 or a text"),
    ("backbone.pretrained=1_000", "1_000 could mean the number 1000 or a text"),
    ("backbone.pretrained=1000", "backbone.pretrained=1000: expected true or false"),
    ("backbone.kwargs.a=2024_01", "2024_01 could mean the number 202401 or a text", "'backbone.kwargs.a=\"2024_01\"'"),
    ("quant.blocks={true:{bits:1}}", "quant.blocks={True: {bits: 1}}: expected settings for each number"),
    # more than a setting can be
    ("seed=" + "9" * 400, "seed=999", "an integer here is below 2^63"),
    ("seed=" + "9" * 5000, "seed=999", "can't be read (Exceeds the limit (4300 digits)"),
    ("optim.lr=" + "9" * 400, "optim.lr=999", "an integer here is below 2^63"),
    ("backbone.mean=[1,2," + "9" * 400 + "]", "an integer here is below 2^63"),
    ("device=cuda:" + "9" * 20, "expected auto, cpu, cuda, cuda:N or mps"),
    ("method.blocks=last:" + "9" * 20, "expected all or last:K"),
    ("backbone.crop_pct=1e-9", "backbone.crop_pct=1e-09: expected a number from 0.1 to 1"),
    ("optim.mixup=1e-320", "optim.mixup=1e-320: expected 0, or a number from 0.001 to 1000"),
    ("backbone.image_size=100000", "expected an integer from 1 to 16384"),
    ("workers=1000000", "workers=1000000: expected an integer from 0 to 1024"),
    ("backbone.name=../../X", "backbone.name=../../X: expected a name of at most 100 letters"),
    ("backbone.name=.hidden", "backbone.name=.hidden: expected a name"),
    ("run_dir=" + "x" * 5000, "run_dir=xxx", "expected a path: names of at most 255 bytes"),
    ("'dataset.root=\"~no_such_user/photos\"'", "expected a path", "~ only with a home folder"),
    ("seed=" + "[" * 20_000, "has 20,005 characters; at most 10,000 are read"),
    ("seed=" + "[" * 2000 + "]" * 2000, "seed=[[["),
    ("a." * 3000 + "b=1", "no such setting; the longest name has less than 200 characters"),
    ("'run_dir=\"\udcff\"'", "\\udcff", "is no text in UTF-8"),
    # references: what leads nowhere, round in a circle, or to too much
    ("method.name=${method}", "method.name=null: expected one of the "),
    ("backbone.kwargs.a=${nope}", "backbone.kwargs: can't be resolved", "'nope' not found"),
    ("backbone.mean=[${nope}]", "backbone.mean: can't be resolved", "'nope' not found"),
    ("seed=${seed}", "seed: can't be resolved"),
    ("optim.lr=${method.lr} method.lr=${optim.lr}", "method.lr: can't be resolved"),
    ("seed=" + "${" * 2000, "these words refer to others 2000 times (${...}); at most 16 times are followed"),
    (" ".join(f"backbone.kwargs.a{i + 1}=${{.a{i}}}${{.a{i}}}" for i in range(30)), "refer to others 60 times"),
    # what can't be read or resolved
    ("vit_b", "vit_b: expected key=value (did you mean backbone=vit_b?)"),
    ("seed=0,1", "seed=0,1: one value is expected here"),
    ("'run_dir=a(b'", "run_dir=a(b: can't be read", "quote special characters"),
    ("=3", "=3: expected key=value"),
    ("~optim.lr", "~optim.lr: nothing can be deleted"),
    ("optim.lr=${method.lrr}", "optim.lr: can't be resolved", "'method.lrr' not found"),
    ("backbone=timm", "backbone.name: has no value; add backbone.name=..."),
]


@pytest.mark.parametrize("case", BAD, ids=[case[0] for case in BAD])
def test_bad_input_is_refused_in_plain_words(case, capsys):
    words, *expected = case
    assert main(["validate", *shlex.split(words)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    for part in expected:
        assert part in said.err


def test_all_problems_are_reported_together(capsys):
    words = [
        "+typo=1",
        "optim.epochs=abc",
        "quant.bits=0",
        "precision=fp23",
        "a b",
        "method.rank=4",
        "dataset=cifar",
        "dataset.shts=1",
    ]
    assert main(["validate", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    keys = [line.split(":")[0].strip() for line in lines[1:]]
    assert lines[0] == "s2a: 7 problems:" and len(keys) == 7
    assert set(keys) == {
        "typo",
        "optim.epochs=abc",
        "quant.bits=0",
        "precision=fp23",
        "a b",
        "method.rank",
        "dataset=cifar",
    }
    assert "dataset.shts" not in str(lines), "nothing is said about a group whose option is unknown"


def test_a_value_that_other_settings_take_over_is_reported_once(capsys):
    assert main(["validate", "method.lr=-1", "quant.bits=0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("=")[0].strip() for line in lines[1:]] == ["method.lr", "quant.bits"]


def test_a_broken_config_file_is_one_line(tmp_path, capsys):
    (tmp_path / "method").mkdir()
    (tmp_path / "config.yaml").write_text("defaults:\n  - method: odd\n")
    (tmp_path / "method" / "odd.yaml").write_text("name: [")
    with pytest.raises(UserError) as raised:
        compose([], tmp_path)
    assert "\n" not in str(raised.value)


def test_cfg_job_prints_a_config_that_reads_back_to_itself(capsys):
    words = ["method=prompt", "method.rank=2", "backbone.mean=[0.1,0.2,0.3]", "run_dir='it: #1'", "optim.lr=1e-5"]
    assert main(["train", *words, "--cfg", "job"]) == 0
    printed = capsys.readouterr().out
    config = compose(words)
    assert OmegaConf.create(printed) == config
    assert recompose(OmegaConf.to_container(OmegaConf.create(printed)), []) == config


def test_without_a_home_folder_it_says_what_to_set(monkeypatch, capsys):
    monkeypatch.delenv("S2A_DATA", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user that no list knows, with HOME unset
    assert main(["train", "method=linear", "quant=none", "device=cpu"]) == 2
    assert "~/.cache/s2a: there is no such home folder; set S2A_DATA" in capsys.readouterr().err
    assert main(["validate", "'dataset.root=\"~/photos\"'".strip("'")]) == 2
    assert "expected a path" in capsys.readouterr().err
