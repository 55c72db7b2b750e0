"""Other people's training loops, with the real libraries: each trains every vote, and nothing that is frozen."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import pytest
import torch
from models import CLASSES, NORMS, inputs, net, targets, vit
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import s2a_cli

RATE = 0.01


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(8, 3, 16, 16, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(8) % CLASSES), batch_size=4)


def fresh(compressed: bool = False):
    """A model with the same things attached every time, and its memory."""
    torch.manual_seed(3)
    attached = s2a_cli.attach(vit(), "s2a")
    memory = s2a_cli.compress_activations(bits=8) if compressed else s2a_cli.checkpointed(attached.blocks)
    return attached, memory


def train(attached: s2a_cli.Attached, memory: AbstractContextManager, model: nn.Module) -> None:
    """Two steps of a loop written by hand. model: the attached one, or what is wrapped around it."""
    optimizer = torch.optim.SGD(attached.parameter_groups(RATE))
    for images, labels in loader():
        with memory:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def plainly(compressed: bool = False) -> dict[str, torch.Tensor]:
    """The tensors after two steps of a loop written by hand."""
    attached, memory = fresh(compressed)
    train(attached, memory, attached.model.train())
    return attached.state_dict()


def check(attached: s2a_cli.Attached, compressed: bool = False) -> None:
    """The tensors are those of the loop written by hand, and the frozen ones those of before."""
    found, wanted, before = attached.state_dict(), plainly(compressed), vit().state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-7)
    for name, tensor in attached.model.state_dict().items():
        assert name in found or torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("compressed", [False, True])
def test_lightning(compressed, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.attached, self.memory = fresh(compressed)
            self.model = self.attached.model.train()  # Lightning leaves the mode that it finds

        def training_step(self, batch, index):
            images, labels = batch
            with self.memory:
                return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.attached.parameter_groups(RATE))

    module = Module()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, loader())
    check(module.attached, compressed)


def test_gradual_unfreezing_in_lightning(tmp_path):
    """By its own callback: the last block thaws before the second epoch, as parameters of the same optimiser."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    from lightning.pytorch.callbacks import BaseFinetuning

    class Thaw(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            pass  # it is frozen

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                before.update({name: t.clone() for name, t in pl_module.model.state_dict().items()})
                self.unfreeze_and_add_param_group(attached.blocks[-1].mlp, optimizer, lr=RATE)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = attached.model.train()

        def training_step(self, batch, index):
            with memory:
                return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(attached.parameter_groups(RATE))

    attached, memory = fresh()
    before: dict[str, torch.Tensor] = {}
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, callbacks=[Thaw()], **quiet)
    trainer.fit(Module(), loader())
    name = "blocks.2.mlp.fc1.weight"
    assert torch.equal(before[name], vit().state_dict()[name])
    assert not torch.equal(attached.model.state_dict()[name], before[name])
    assert name in attached.state_dict() and "blocks.1.mlp.fc1.weight" not in attached.state_dict()
    again = s2a_cli.attach(vit(), "s2a")
    with pytest.raises(s2a_cli.UserError, match=r"has blocks\.2\.mlp.*frozen here; requires_grad_\(True\) thaws"):
        again.load_state_dict(attached.state_dict())
    again.blocks[-1].mlp.requires_grad_(True)
    again.load_state_dict(attached.state_dict())
    x = inputs(again.model)
    assert torch.equal(again.model(*x), attached.model.eval()(*x))


def test_weight_averaging_in_lightning(tmp_path):
    """Its callback copies the module that holds the memory as a whole."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.attached, self.memory = fresh(compressed=True)
            self.model = self.attached.model.train()

        def training_step(self, batch, index):
            with self.memory:
                return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.attached.parameter_groups(RATE))

    module, average = Module(), EMAWeightAveraging(decay=0.5)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, callbacks=[average], **quiet
    )
    trainer.fit(module, loader())
    wanted, found = plainly(compressed=True), module.attached.state_dict()
    assert found.keys() == wanted.keys()
    assert any(not torch.equal(found[name], wanted[name]) for name in found)  # the average, which it leaves in the end


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compressed", [False, True])
def test_distributed_data_parallel(compressed, one_process):
    attached, memory = fresh(compressed)
    train(attached, memory, DistributedDataParallel(attached.model.train()))
    check(attached, compressed)


@pytest.mark.parametrize("compressed", [False, True])
def test_accelerate(compressed):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    attached, memory = fresh(compressed)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, batches = accelerator.prepare(
        attached.model.train(), torch.optim.SGD(attached.parameter_groups(RATE)), loader()
    )
    for images, labels in batches:
        with accelerator.accumulate(model):
            with memory:
                loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.unwrap_model(model) is attached.model
    check(attached, compressed)


def test_accelerate_in_bf16():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    attached, memory = fresh()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(attached.model.train())
    with memory:
        output = model(*inputs(attached.model))
        loss = F.cross_entropy(output, targets())
    accelerator.backward(loss)
    assert output.dtype == torch.float32 and all(p.grad is not None for p in attached.parameters())


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_moving_averages(kind):
    attached = s2a_cli.attach(vit(), "s2a")
    model = attached.model
    if kind == "torch":
        average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        average.update_parameters(model)  # the first only copies
        update = average.update_parameters
    else:
        from timm.utils import ModelEmaV3

        average = ModelEmaV3(model, decay=0.5)
        update = average.update
    optimizer = torch.optim.SGD(attached.parameter_groups(0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(model.train()(*inputs(model)), targets()).backward()
    optimizer.step()
    update(model)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, (before[name] + model.get_parameter(name)) / 2)
    x = inputs(model)
    found = average.module.eval()(*x)
    assert found.shape == (4, CLASSES) and not torch.equal(found, model.eval()(*x))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_frozen_batch_norms_stay_on_their_statistics(norm):
    model = net(norm)
    attached = s2a_cli.attach(model, "bias", inputs=inputs(model))
    for _ in range(2):
        F.cross_entropy(model.train()(*inputs(model)), targets()).backward()
    model.train().units[0](torch.randn(2, 8, 6, 9))  # a part of the model alone
    assert all(unit.norm.running_mean.abs().max() == 0 and unit.norm.weight.grad is None for unit in model.units)
    attached.blocks[-1].norm.requires_grad_(True)  # one that thaws uses its batch
    model.train()(*inputs(model))
    assert model.units[-1].norm.running_mean.abs().max() > 0 == model.units[0].norm.running_mean.abs().max()


@pytest.mark.slow
def test_compiled_models_learn_the_same():
    def gradients(compiles: bool) -> dict:
        torch.manual_seed(3)
        attached = s2a_cli.attach(vit(), "s2a")
        model = torch.compile(attached.model.train(), backend="aot_eager") if compiles else attached.model.train()
        F.cross_entropy(model(*inputs(attached.model)), targets()).backward()
        return {name: p.grad for name, p in attached.named_parameters()}

    found, wanted = gradients(True), gradients(False)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory", [{"bits": 4}, {"config": "tiny"}], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_refused_where_activations_are_compressed(memory, in_place):
    model = vit()
    context = s2a_cli.compress_activations(**memory, blocks=model.blocks)
    compiled = copy.copy(model)
    compiled.compile(backend="eager") if in_place else (compiled := torch.compile(model, backend="eager"))
    with context, pytest.raises(RuntimeError, match="torch.compile"):
        compiled(*inputs(model))
    with context:
        assert model(*inputs(model)).requires_grad  # itself, as the message says


def test_the_names_of_the_package():
    assert set(s2a_cli.__all__) <= set(dir(s2a_cli)) and all(getattr(s2a_cli, name) for name in s2a_cli.__all__)
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        s2a_cli.atach  # pyright: ignore
