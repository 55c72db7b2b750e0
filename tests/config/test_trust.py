"""A run folder that somebody else has written: its config reads, fetches and writes nothing elsewhere."""

from __future__ import annotations

import http.server
import json
import threading

import pytest
from omegaconf import OmegaConf

from s2a_cli import backbones
from s2a_cli.cli.main import main
from s2a_cli.common.errors import UserError
from s2a_cli.config import trust
from s2a_cli.config.compose import compose, recompose
from s2a_cli.config.schema import BackboneConfig

BASE = ["backbone=vit_micro", "method=linear", "quant=none", "device=cpu", "workers=0"]


@pytest.fixture
def requests():
    """Yields (address of a server, what was asked of it)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.fixture
def foreign(tmp_path, make_result):
    """Returns a function: {dotted key: value} -> the folder of a run whose stored config says so."""

    def write(changes):
        config = OmegaConf.to_container(compose(BASE))
        for key, value in changes.items():
            *nodes, name = key.split(".")
            at = config
            for node in nodes:
                at = at[node]
            at[name] = value
        (tmp_path / "run").mkdir()
        (tmp_path / "run/result.json").write_text(json.dumps(make_result() | {"config": config}))
        return tmp_path / "run"

    return write


def test_a_foreign_run_sends_nothing_and_writes_nothing(tmp_path, foreign, requests, monkeypatch, capsys):
    address, asked = requests
    monkeypatch.setenv("A_SECRET", "hunter2")
    attacks = {
        "backbone.checkpoint": None,
        "backbone.kwargs.cache_dir": str(tmp_path / "planted"),
        "backbone.kwargs.pretrained_cfg_overlay": {"url": f"{address}/x", "hf_hub_id": None, "source": "url"},
    }
    run = foreign(attacks)
    before = sorted(tmp_path.rglob("*"))
    assert main(["eval", f"run={run}"]) == 2
    said = capsys.readouterr().err
    assert "backbone.kwargs.cache_dir: chooses what is loaded" in said and "pretrained_cfg_overlay: chooses" in said
    assert asked == [] and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", ["backbone.name", "backbone.kwargs.img_size", "dataset.root", "run_dir", "seed"])
def test_a_stored_config_is_never_resolved(foreign, monkeypatch, capsys, key):
    monkeypatch.setenv("A_SECRET", "hunter2")
    assert main(["eval", f"run={foreign({key: 'x${oc.env:A_SECRET}'})}"]) == 2
    said = capsys.readouterr().err
    if key == "seed":  # no record has a text there
        assert "result.json: can't be read (config.seed: " in said and "expected an integer" in said
    else:
        assert said.startswith(f"s2a: config.{key}=x${{oc.env:A_SECRET}}: a stored config refers to nothing")
    assert "hunter2" not in said and len(said.splitlines()) == 1


def test_references_that_multiply_and_endless_nesting_are_refused_at_once(foreign, capsys):
    laughs = {f"backbone.kwargs.a{i + 1}": f"${{.a{i}}}${{.a{i}}}" for i in range(40)}
    assert main(["eval", f"run={foreign(laughs)}"]) == 2
    assert "refers to nothing" in capsys.readouterr().err
    nested = stored = OmegaConf.to_container(compose(BASE))
    for _ in range(100_000):
        nested["method"] = nested = {}
    with pytest.raises(UserError, match="nested deeper"):
        recompose(stored, [])
    with pytest.raises(UserError, match="is no settings"):
        recompose([1], [])


def test_what_a_stored_config_says_stays_on_one_line(foreign, capsys):
    assert main(["eval", f"run={foreign({'backbone.kwargs': {}, 'odd' + chr(27) + '[2J' + chr(10) + 'key': 1})}"]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("s2a: odd\\x1b[2J\\nkey: no such setting")
        and "\x1b" not in said
        and len(said.splitlines()) == 1
    )


def test_a_stored_root_is_read_and_never_filled(foreign, tmp_path, capsys):
    run = foreign({"dataset.name": "cifar10", "dataset.root": str(tmp_path / "planted")})
    assert main(["eval", f"run={run}"]) == 2
    assert "is missing and dataset.download=false" in capsys.readouterr().err and not (tmp_path / "planted").exists()
    stored = json.loads((run / "result.json").read_text())["config"]
    assert recompose(stored, ["dataset.root=/mine"]).dataset.download is True
    assert recompose(stored, ["dataset.root=/mine", "dataset.download=false"]).dataset.download is False
    assert recompose(stored, ["dataset.download=true"]).dataset.download is True


@pytest.mark.parametrize("name", trust.LOADERS)
def test_no_argument_of_timm_that_loads_gets_through(name):
    with pytest.raises(UserError, match=f"backbone.kwargs.{name}: chooses what is loaded"):
        compose([*BASE, f"+backbone.kwargs.{name}=x"])
    with pytest.raises(UserError, match=f"backbone.kwargs.{name}: vit_tiny_patch16_224 takes no such setting"):
        backbones.build(BackboneConfig("tiny", "vit_tiny_patch16_224", False, kwargs={name: "x"}), 5)


@pytest.mark.parametrize("value", ["http://x/y", "../x", "{a: 1}", "[[[[[1]]]]]", "70000", "inf", "'a\\'b'"])
def test_settings_of_a_model_are_plain(value):
    with pytest.raises(
        UserError, match=r"backbone.kwargs.norm_layer=.*expected a number below 65536, true, false, a word"
    ):
        compose([*BASE, f"+backbone.kwargs.norm_layer={value}"])


@pytest.mark.parametrize(
    ("timm", "kwargs"),
    [
        (
            "vit_tiny_patch16_224",
            dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, class_token=False, global_pool="avg"),
        ),
        (
            "vit_tiny_patch16_224",
            dict(dynamic_img_size=True, drop_path_rate=0.1, norm_layer="rmsnorm", act_layer="silu", init_values=1e-5),
        ),
        (
            "swin_tiny_patch4_window7_224",
            dict(img_size=32, window_size=4, embed_dim=24, depths=(1, 2), num_heads=(2, 4)),
        ),
        (
            "resnet18",
            dict(stem_type="deep", stem_width=16, channels=(16, 24, 32, 48), layers=(1, 1, 1, 1), avg_down=True),
        ),
        ("mobilenetv3_small_050", dict(drop_rate=0.1, pad_type="same", bn_eps=1e-3, act_layer="relu")),
        ("regnety_002", dict(se_ratio=0.5, stem_width=16)),
        ("coatnet_nano_rw_224", dict(depths=[1, 1, 1, 1], transformer_dim_head=16, conv_kernel_size=5)),
        ("deit_tiny_distilled_patch16_224", dict(img_size=32, depth=1)),
    ],
)
def test_what_shapes_a_model_is_taken(timm, kwargs):
    words = [
        f"+backbone.kwargs.{key}={str(list(v) if isinstance(v, tuple) else v).lower()}" for key, v in kwargs.items()
    ]
    config = compose(["backbone=timm", f"backbone.name={timm}", "backbone.pretrained=false", *words]).backbone
    assert backbones.build(config, 5, meta=True).head.classes == 5


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        (dict(embed_dim=60_000, depth=8), r"take 1,[0-9]{3} GiB; this machine has"),
        (dict(embed_dim="x"), "timm can't make vit_tiny_patch16_224"),
        (dict(num_heads=0), "timm can't make vit_tiny_patch16_224"),
        (dict(act_layer="nope"), "timm can't make vit_tiny_patch16_224"),
        (dict(dept=2), r"takes no such setting \(did you mean 'depth'\?\)"),
    ],
)
def test_models_that_can_not_be(kwargs, said):
    with pytest.raises(UserError, match=said) as raised:
        backbones.build(BackboneConfig("tiny", "vit_tiny_patch16_224", False, kwargs=kwargs), 5)
    assert "\n" not in str(raised.value)
