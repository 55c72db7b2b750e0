"""attach to models that were pickled, made elsewhere, or are of several dtypes."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
from models import inputs, vit
from torch import nn
from torch.utils.hooks import RemovableHandle

import s2a_cli


def test_hooks_of_an_unpickled_model_survive_those_of_a_new_process(monkeypatch):
    attached = s2a_cli.attach(vit(), "vpt_deep")
    for saved in (attached, attached.model):
        torch.save(saved, file := io.BytesIO())
        monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a new process
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        model = loaded.model if isinstance(loaded, s2a_cli.Attached) else loaded
        taken = {number for module in model.modules() for number in module._forward_pre_hooks}
        hook = model.get_submodule("blocks.0").register_forward_pre_hook(lambda *_: None)
        assert taken and hook.id > max(taken)
        x = inputs(model)
        assert torch.equal(model(*x), attached.model(*x))


def scripted() -> nn.Module:
    traced = torch.jit.trace(nn.Flatten(), torch.ones(1, 3, 4, 4))
    assert isinstance(traced, nn.Module)
    return nn.Sequential(traced, nn.Linear(48, 5))


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(5))


@torch.inference_mode()
def inferring() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (scripted, "torch.jit has scripted or traced"),
        (lazy, "lazy modules"),
        (inferring, "within torch.inference_mode"),
    ],
)
def test_models_that_nothing_can_be_attached_to(make, said):
    with pytest.raises(s2a_cli.UserError, match=said):
        s2a_cli.attach(make(), "linear", inputs=(1, 3, 4, 4))


def test_what_is_made_within_inference_mode_would_not_train():
    model = vit()
    with torch.inference_mode(), pytest.raises(s2a_cli.UserError, match="leave it before"):
        s2a_cli.attach(model)


@pytest.mark.parametrize("method", ["s2a", "lora"])
def test_what_is_added_is_where_the_model_is(method):
    if method == "lora":
        pytest.importorskip("peft", reason="peft is not installed")
    model, plain = vit(), vit()
    torch.manual_seed(3)
    wanted = s2a_cli.attach(plain, method).state_dict()
    torch.manual_seed(3)
    with torch.device("meta"):
        found = s2a_cli.attach(model, method).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    model(*inputs(model))


def mixed() -> nn.Module:
    """Of bfloat16, but for its head."""
    model = vit().bfloat16()
    model.get_submodule("head").float().register_forward_pre_hook(lambda _, args: (args[0].float(),))
    return model


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("s2a", torch.float32), *((name, torch.bfloat16) for name in ("adaptformer", "fact_tt", "lst", "side_tuning"))],
)
def test_what_is_added_to_a_model_of_two_dtypes_computes_in_one_of_them(method, dtype):
    model = mixed()
    attached = s2a_cli.attach(model, method)
    assert {p.dtype for p in model.get_submodule("s2a").parameters()} == {dtype}
    model.train()(inputs(model)[0].bfloat16()).sum().backward()
    assert all(p.grad is not None for p in attached.parameters())


def test_models_that_compute_under_autocast_alone_take_everything():
    model = vit().bfloat16()
    model.get_submodule("head").float()
    attached = s2a_cli.attach(model, "unipt")
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(inputs(model)[0].bfloat16()).sum().backward()
    assert {p.grad.dtype for p in attached.parameters() if p.grad is not None} == {torch.float32}


def test_what_computes_in_neither_of_two_dtypes_is_refused():
    with pytest.raises(s2a_cli.UserError, match=r"is of torch\.float32 and torch\.bfloat16, in neither of which"):
        s2a_cli.attach(mixed(), "unipt")


def test_modules_keep_their_modes():
    model = vit().train()
    model.get_submodule("blocks.0").eval()
    before = [module.training for module in model.modules()]
    s2a_cli.attach(model, "bias")
    assert [module.training for name, module in model.named_modules() if not name.startswith("s2a")] == before


class Positions(nn.Module):
    """Makes a table of positions in its first forward pass, and keeps one for each device, as timm's models do."""

    def __init__(self):
        super().__init__()
        self.table: torch.Tensor | None = None
        self.tables: dict[str, torch.Tensor] = {}

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[1])[:, None]
        self.tables.setdefault(str(x.device), torch.linspace(1, 2, x.shape[1])[:, None])
        return x * self.tables[str(x.device)] + self.table


@pytest.mark.parametrize("first", [False, True], ids=["before its first pass", "behind its first pass"])
def test_tables_that_a_model_makes_when_it_first_runs_are_none_without_data(first):
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), nn.Linear(16, 16), Positions())
    model = nn.Sequential(stem, nn.Flatten(1), nn.Linear(256, 5)).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = copy.deepcopy(model)(x)
    if first:
        model(x)
    tables = model[0][3].table, dict(model[0][3].tables)
    s2a_cli.predict_memory(model, (4, 3, 16, 16))
    attached = s2a_cli.attach(model, "linear", inputs=(1, 3, 16, 16))
    assert (model[0][3].table, model[0][3].tables) == tables
    assert torch.equal(model(x), expected)
    attached.detach()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["tiny_vit_5m_224.dist_in22k_ft_in1k", "levit_128s.fb_dist_in1k"])
def test_bias_tables_that_timm_keeps_in_evaluation_are_those_of_the_weights(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    for parameter_name, parameter in model.named_parameters():
        if "attention_bias" in parameter_name:
            nn.init.normal_(parameter)
    x = torch.randn(1, 3, 224, 224)
    expected = copy.deepcopy(model)(x)
    s2a_cli.attach(model, "linear")
    assert torch.equal(model.eval()(x), expected)


def test_padded_tokens_as_nested_tensors_are_refused_in_a_line():
    class Padded(nn.Module):
        def __init__(self, nested: bool):
            super().__init__()
            layer = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True, dropout=0.0)
            self.stem, self.head = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 5)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=nested)

        def forward(self, x):
            x = self.stem(x).flatten(2).transpose(1, 2)
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            padding[:, -3:] = True
            return self.head(self.encoder(x, src_key_padding_mask=padding)[:, :-3].mean(1))

    x = torch.randn(2, 3, 16, 16)
    for nested in (False, True):
        model = s2a_cli.attach(Padded(nested), "side", inputs=(1, 3, 16, 16)).model
        model.train()(x).sum().backward()
        with torch.no_grad():
            if nested:
                with pytest.raises(s2a_cli.UserError, match="nested tensor.*enable_nested_tensor=False"):
                    model.eval()(x)
            else:
                assert model.eval()(x).shape == (2, 5)
