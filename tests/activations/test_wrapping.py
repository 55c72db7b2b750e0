"""Blocks are wrapped without being owned: forwards of others, nested use, shared modules, threads, copies."""

from __future__ import annotations

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from s2a_cli.activations import compress_activations
from s2a_cli.config.schema import QuantConfig

RECOMPUTED = QuantConfig(recompute="block", input=8, pointwise=4)
CODED = QuantConfig(bits=4)


class Block(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def blocks_of(count: int = 3) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block() for _ in range(count))


def test_a_forward_of_the_instance_is_called_and_comes_back():
    """Hooks of accelerate, quantisers and users replace module.forward."""
    block, calls = Block(), []
    plain = block.forward

    def own(x):
        calls.append(1)
        return plain(x)

    block.forward = own
    memory = compress_activations(RECOMPUTED, [block])
    x = torch.randn(2, 5, 32, requires_grad=True)
    for _ in range(2):
        with memory:
            out = block(x)
        assert block.forward is own and calls
        calls.clear()
    torch.testing.assert_close(out, plain(x))
    out.sum().backward()
    assert calls, "what is computed again is what ran"


def test_a_forward_that_is_replaced_within_stays():
    block = Block()
    memory = compress_activations(RECOMPUTED, [block])
    with memory:
        block.forward = own = lambda x: x
    assert block.forward is own


def test_a_forward_that_is_wrapped_within_can_be_wrapped_again():
    """A hook that is put on in one step, around our forward, and stays for the next ones."""
    block, calls, memory = Block(), [], None
    memory = compress_activations(RECOMPUTED, [block])
    x = torch.randn(4, 5, 32, requires_grad=True)
    with memory:
        ours = block.forward
        block.forward = lambda x: calls.append(1) or ours(x)
        first = torch.autograd.grad(block(x).square().sum(), x)[0]
    wrapped = block.forward
    for _ in range(2):
        with memory:
            again = torch.autograd.grad(block(x).square().sum(), x)[0]
        assert block.forward is wrapped
    assert torch.equal(first, again) and type(block(x).grad_fn).__name__ == "AddBackward0"
    assert len(calls) >= 4


def test_a_forward_that_is_put_back_later_is_the_modules_own():
    """As a patch does that is made within a memory and undone behind it."""
    block = Block()
    memory, x = compress_activations(RECOMPUTED, [block]), torch.randn(4, 5, 32, requires_grad=True)
    with memory:
        found = block.forward
        block.forward = lambda x: x
    block.forward = found
    assert type(block(x).grad_fn).__name__ == "AddBackward0"
    assert type(copy.deepcopy(block)(x).grad_fn).__name__ == "AddBackward0"
    with memory:
        assert type(block(x).grad_fn).__name__ == "RecomputeBackward"
    assert "forward" not in block.__dict__


class Outer(nn.Module):
    """A block that holds another one, as a stage of a hierarchical model does."""

    def __init__(self):
        super().__init__()
        self.inner, self.mlp = Block(), nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.mlp.fc1, self.mlp.fc2 = self.mlp[0], self.mlp[2]

    def forward(self, x):
        return x + self.mlp(self.inner(x))


@pytest.mark.parametrize("config", [{"recompute": "block"}, {"recompute": "block", "chunks": 2}, {"chunks": 2}, {}])
def test_a_block_within_a_block(config, set_chunk_sizes):
    torch.manual_seed(0)
    set_chunk_sizes(mlp=32)
    outer, x = Outer().double(), torch.randn(4, 5, 32, dtype=torch.float64, requires_grad=True)
    trained = [x, *outer.parameters()]
    exact = torch.autograd.grad(outer(x).square().sum(), trained)
    quant = QuantConfig(name="test", lossless=False, **({"chunks": None} | config))
    for blocks in ([outer, outer.inner], [outer.inner, outer], [outer, outer.mlp], [nn.Sequential(outer), outer]):
        memory = compress_activations(quant, blocks)
        with memory:
            out = blocks[0](x) if blocks[0] is not outer.inner else outer(x)
        for found, expected in zip(torch.autograd.grad(out.square().sum(), trained), exact):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("config", [RECOMPUTED, CODED, QuantConfig()], ids=["recomputed", "coded", "lossless"])
def test_entering_a_memory_within_itself_changes_nothing(config):
    blocks = blocks_of(1)
    x, found = torch.randn(4, 5, 32), []
    for depth in (1, 3):
        memory, start = compress_activations(config, blocks), x.clone().requires_grad_()
        with memory:
            if depth > 1:
                with memory:
                    with memory:
                        pass
                    out = blocks[0](start)
            else:
                out = blocks[0](start)
            assert type(F.relu(start).grad_fn).__name__ == "ElementwiseBackward", "still within"
        found.append(torch.autograd.grad(out.square().sum(), start)[0])
        assert "forward" not in blocks[0].__dict__ and type(F.relu(start).grad_fn).__name__ == "ReluBackward0"
    assert torch.equal(*found)


def test_a_memory_within_another_is_refused():
    blocks = blocks_of(1)
    first, second = compress_activations(CODED, blocks), compress_activations(RECOMPUTED, blocks)
    with first:
        with pytest.raises(RuntimeError, match="within another compress_activations"):
            second.__enter__()
        assert blocks[0].forward.block is first.blocks[0]
    assert "forward" not in blocks[0].__dict__
    with second:
        pass


def test_a_memory_in_another_thread_is_refused_the_same_block():
    blocks = blocks_of(1)
    first, second, said = compress_activations(CODED, blocks), compress_activations(RECOMPUTED, blocks), []

    def elsewhere() -> None:
        for use in (second.__enter__, lambda: first.__exit__(None, None, None)):
            try:
                use()
            except RuntimeError as error:
                said.append(str(error))

    with first:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert blocks[0].forward.block is first.blocks[0], "as it was"
    assert "block 0 is within another compress_activations(...), in another thread" in said[0]
    assert "leave it in the thread that entered it" in said[1]
    with second:
        pass
    assert "forward" not in blocks[0].__dict__


def test_a_backward_pass_of_one_memory_within_another():
    first, second = blocks_of(2)
    x, memory, other = torch.randn(4, 5, 32, requires_grad=True), compress_activations(RECOMPUTED, [first]), None
    other = compress_activations(CODED, [second])
    grads = []
    for inside in (False, True):
        with memory:
            loss = first(x).square().sum()
        if not inside:
            grads.append(torch.autograd.grad(loss, x)[0])
        else:
            with other:
                grads.append(torch.autograd.grad(loss, x)[0])
                assert other.frame.config == CODED and memory.frame is None
                assert type(F.gelu(x).grad_fn).__name__ == "ElementwiseBackward"
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backward", [torch.autograd.backward, Tensor.backward], ids=["engine", "tensor"])
def test_a_backward_pass_within_a_forward_pass_leaves_names_alone(backward):
    """That of a local loss, in the middle of a model: calls behind it are named as without it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.local = blocks_of(2), False

        def forward(self, x):
            x = self.blocks[0](x)
            if self.local:
                backward(x.square().sum())
                x = x.detach().requires_grad_()
            return F.gelu(self.blocks[1](F.gelu(x)))

    names = []
    for local in (False, True):
        model = Model()
        memory, model.local = compress_activations(QuantConfig(bits=4, recompute="block"), model.blocks), local
        with memory:
            model(torch.randn(4, 5, 32, requires_grad=True)).sum().backward()
        names.append(memory.calibration.fitted().keys())
    assert names[0] == names[1]


def test_a_module_that_is_listed_twice_is_one_block():
    shared = Block()
    x = torch.randn(4, 5, 32, requires_grad=True)
    exact = torch.autograd.grad(shared(shared(x)).square().sum(), x)[0]
    memory = compress_activations(QuantConfig(lossless=False, recompute="block"), [shared, shared])
    with memory:
        out = shared(shared(x))
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], exact)
    with pytest.raises(ValueError, match="blocks 0 and 1 are one module"):
        compress_activations(QuantConfig(bits=4, blocks={1: {"norm": 8}}), [shared, shared])


def test_calls_of_a_shared_module_are_told_apart():
    shared, x = Block(), torch.randn(4, 5, 32, requires_grad=True)
    memory = compress_activations(CODED, [shared])
    with memory:
        shared(shared(x) * 3)
    assert {key.split(".")[0].split(":")[0] for key in memory.calibration.fitted()} >= {"block 0", "block 0@2"}


def test_threads_do_not_disturb_each_other():
    blocks, memory = blocks_of(2), None
    memory = compress_activations(RECOMPUTED, blocks)
    x = torch.randn(16, 5, 32)

    def work(number: int) -> torch.Tensor:
        for _ in range(20):
            start = x.clone().requires_grad_()
            with memory:
                out = blocks[1](blocks[0](start))
            (grad,) = torch.autograd.grad(out.square().sum(), start)
        return grad

    alone = work(0)
    with ThreadPoolExecutor(3) as pool:
        for grad in pool.map(work, range(3)):
            torch.testing.assert_close(grad, alone, rtol=1e-2, atol=1e-2)
    assert all("forward" not in block.__dict__ for block in blocks)


def test_a_memory_is_of_the_thread_that_enters_it():
    blocks, seen = blocks_of(1), {}
    memory = compress_activations(RECOMPUTED, blocks)
    x = torch.randn(4, 5, 32, requires_grad=True)

    def elsewhere() -> None:
        seen["gelu"], seen["block"] = type(F.gelu(x).grad_fn).__name__, type(blocks[0](x).grad_fn).__name__

    with memory:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert seen == {"gelu": "GeluBackward0", "block": "AddBackward0"}


def test_a_thread_that_autograd_hands_the_mode_on_to():
    """As that of a CUDA device, when torch.autograd.grad is called within the memory."""
    block, seen = Block(), {}
    memory = compress_activations(QuantConfig(bits=4, recompute="block"), [block])
    x = torch.randn(4, 5, 32, requires_grad=True)

    def device() -> None:
        TorchFunctionMode.__enter__(memory)
        seen["handed on"] = type(F.gelu(x).grad_fn).__name__
        with memory.again():
            count = memory.frame.counters.linears
            seen["again"] = type(F.gelu(x).grad_fn).__name__
            block.up(x)
            seen["linears"] = memory.frame.counters.linears - count
        seen["after"] = type(F.gelu(x).grad_fn).__name__
        TorchFunctionMode.__exit__(memory, None, None, None)

    thread = threading.Thread(target=device)
    thread.start()
    thread.join()
    assert seen == {
        "handed on": "GeluBackward0",
        "again": "ElementwiseBackward",
        "linears": 1,
        "after": "GeluBackward0",
    }
    exact = torch.autograd.grad(block(x).square().sum(), x)[0]
    with memory:
        found = torch.autograd.grad(block(x).square().sum(), x)[0]
    assert F.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.99


def test_data_parallel_is_refused():
    model = nn.DataParallel(Block())
    with compress_activations(CODED), pytest.raises(RuntimeError, match="DataParallel.*one process a device"):
        model(torch.randn(4, 5, 32))
    model(torch.randn(4, 5, 32))


def test_a_copy_is_made_outside():
    blocks = blocks_of(1)
    with compress_activations(CODED, blocks), pytest.raises(RuntimeError, match="copy it before or after"):
        copy.deepcopy(blocks)
    twin = copy.deepcopy(blocks)
    torch.save(twin, io.BytesIO())
    assert "forward" not in twin[0].__dict__


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", [RECOMPUTED, CODED], ids=["recomputed", "coded"])
def test_checkpointing_of_others_is_refused(config, reentrant):
    """It would compute again outside, where nothing is coded: with an error at best, and silently at worst."""
    blocks = blocks_of()
    x = torch.randn(4, 5, 32, requires_grad=True)
    memory = compress_activations(config, blocks)
    with pytest.raises(RuntimeError, match="set_grad_checkpointing.*recompute='block'"), memory:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
    with memory, torch.no_grad():  # nothing is computed again
        checkpoint(blocks[0], torch.randn(4, 5, 32), use_reentrant=False)
    assert all("forward" not in block.__dict__ for block in blocks)


@pytest.mark.parametrize("config", [RECOMPUTED, CODED], ids=["recomputed", "coded"])
def test_timms_checkpointing_is_refused(config):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    model.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match="set_grad_checkpointing"), compress_activations(config, model.blocks):
        model(torch.randn(2, 3, 32, 32))
    model.set_grad_checkpointing(False)
    with compress_activations(config, model.blocks):
        model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_checkpointing_within_a_block_is_refused_too():
    class Checkpointed(Block):
        def forward(self, x):
            return x + checkpoint(lambda x: self.down(F.gelu(self.up(x))), x, use_reentrant=True)

    block = Checkpointed()
    with compress_activations(CODED, [block]), pytest.raises(RuntimeError, match="torch.utils.checkpoint"):
        block(torch.randn(4, 5, 32, requires_grad=True))


def test_saved_tensor_hooks_that_are_no_checkpoint_are_welcome():
    block = Block()
    with torch.autograd.graph.save_on_cpu(), compress_activations(CODED, [block]):
        block(torch.randn(4, 5, 32, requires_grad=True)).sum().backward()
