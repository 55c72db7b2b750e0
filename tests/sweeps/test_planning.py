"""Which runs a grid has, known before any data or weights are here."""

from __future__ import annotations

import re

import pytest
from omegaconf import OmegaConf

from s2a_cli.cli.main import main
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.memory.margin import Margin
from s2a_cli.memory.result import MIB
from s2a_cli.sweeps import planning
from s2a_cli.sweeps.grid import _several, read_grid

TINY = ["dataset.shots=4", "optim.epochs=1", "optim.batch_size=16", "device=cpu", "workers=0"]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_codes_may_do_more_than_code(capsys):
    """int4 also runs frozen blocks in chunks: for a method that keeps nothing it is another run, as s2a memory says."""
    planned = planning.plan(read_grid([*TINY, "method=linear", "quant=none,int4,tiny"]))
    assert len(planned.members) == 3 and not planned.excluded


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("method=linear,lor", "method=lor: expected one of the .* (did you mean 'lora'?)"),
        ("quant=none,intt4", "quant=intt4: expected one of .* (did you mean 'int4'?)"),
        ("seed=0,abc", "seed=abc: expected an integer from 0"),
        ("optim.lr=1e-3,-1", "optim.lr=-1.0: expected a number above 0"),
        ("compile=false,maybe", "compile=maybe: expected true or false"),
    ],
)
def test_a_value_that_fits_no_run_is_a_mistake(word, said, capsys):
    """It is named once, and nothing is run without it."""
    assert main(["sweep", *TINY, word, "workers=0,1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.match(f"s2a: {said.replace('(', '[(]').replace('?)', '.[)]')}", error), error


def test_items_of_a_grids_list_are_what_hydra_reads():
    assert _several(["[lora,side]", "bias", "a, (b)", "range(0,2)"]) == '[lora,side],bias,"a, (b)",range(0,2)'


def test_random_weights_are_those_of_a_seed():
    """Also where a backbone names a file of weights, which pretrained=false leaves alone."""
    words = [*TINY, "backbone=vit_micro", "backbone.pretrained=false", "method=linear", "seed=0,1"]
    one, two = planning.plan(read_grid(words)).members
    assert one.content != two.content and one.folder != two.folder
    for member in (one, two):
        assert main(["train", *member.command]) == 0 and member.state() == "done"


def test_a_plan_without_data_and_weights(tmp_path, monkeypatch):
    """--dry-run: what is not on this machine is named once, and nothing is downloaded."""
    monkeypatch.setenv("S2A_DATA", str(tmp_path))
    words = ["backbone=vit_t", "backbone.image_size=32", "dataset=cifar10,digits", "method=bias", "seed=range(0,3)"]
    planned = planning.plan(read_grid(words), dry=True)
    assert [member.classes for member in planned.members] == [10] * 6 and planned.members[0].images == 45_000
    assert {member.state() for member in planned.members} == {"unknown"}
    assert len(planned.missing) == 2 and "the data of cifar10 (" in planned.missing[0]
    assert planned.missing[1] == "the weights of vit_t (vit_tiny_patch16_224.augreg_in21k)"
    asked, profile = [], planning.forecast.profile_composition
    monkeypatch.setattr(planning.forecast, "profile_composition", lambda *args: asked.append(args) or profile(*args))
    planning.predict(planned.members)
    needed = {member.needed_mib - Margin().around(member.peak_mib * MIB) / MIB for member in planned.members}
    assert min(needed) >= 0, "what the allocator takes is no less than the peak"
    assert len(asked) == 1, "neither seeds nor data sets of as many classes are predicted again"
    for grid in ("budget=null,2GiB", "cuda_graphs=null,true"):
        planning.predict(planning.plan(read_grid([*words, "dataset=cifar10", "seed=0", grid]), dry=True).members)
    assert len(asked) == 5, "what changes the peak is predicted, two in each grid"
    shown = planning.overview(planned, predicted=True)
    assert shown.count("not on this machine") == 2 and "runs/cifar10/vit_t/bias/?" in shown
    with pytest.raises(UserError, match="could not be downloaded"):
        planning.plan(read_grid(["backbone=vit_t", "method=bias"]))
    with pytest.raises(UserError, match="dataset.root=nowhere does not exist"):
        planning.plan(read_grid(["backbone=vit_t", "dataset=folder", "method=bias", "dataset.root=nowhere"]))


def test_members_that_differ_in_their_seed_are_what_their_words_say():
    grid = read_grid(["dataset=digits", "method=bias,linear", "seed=0,1,7", "dataset.split_seed=${seed}"])
    assert [member.config for member in grid.members] == [compose(member.words) for member in grid.members]
    grid = read_grid(["dataset=digits", "method=bias,linear", "seed=range(0,3)"])
    assert [member.config.seed for member in grid.members] == [0, 1, 2] * 2
    for member in grid.members:
        expected = compose(member.words)
        assert member.config == expected and OmegaConf.get_type(member.config) is OmegaConf.get_type(expected)
    with pytest.raises(UserError, match="seed"):
        read_grid(["dataset=digits", "seed=-1,-2"])


@pytest.mark.parametrize("folder", ["été", "photos, new (copy)", "1e3"])
def test_the_words_of_a_run_name_its_folder_whatever_it_is_called(folder):
    (member,) = planning.plan(read_grid([*TINY, "method=bias", f'sweep.dir="{folder}"'])).members
    assert member.folder.parts[0] == folder and compose(member.command).run_dir == str(member.folder)
