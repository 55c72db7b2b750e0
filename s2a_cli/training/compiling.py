"""Compiles the model of a run with torch.compile, where its result can be trusted."""

from __future__ import annotations

import torch
import torch._functorch.config as functorch_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from s2a_cli.common.dataless import Dataless
from s2a_cli.common.errors import UserError
from s2a_cli.memory.predict import dataless_tensors
from s2a_cli.training.step import train_mode


def compile_model(model: nn.Module, budget: float | None, image_size: int) -> None:
    """Compiles a model in place.

    budget: the share of activations that the compiler may keep; None: as many as it likes. Raises UserError for a
    budget below 1 where the model draws random numbers: the compiler would draw others in what it computes again
    (PyTorch 2.14).
    """
    if budget is not None and budget < 1 and (drawn := watched(model, image_size).random):
        raise UserError(
            f"compile_budget={budget:g}: this model draws random numbers in training ({drawn[0]}), and the compiler"
            " draws others when it computes activations again, so that gradients would be wrong; set compile_budget=1,"
            " or the rates of dropout and stochastic depth in backbone.kwargs to 0"
        )
    functorch_config.activation_memory_budget = 1.0 if budget is None else budget
    model.compile()


class Watched(TorchDispatchMode):
    """Collects the operators that draw random numbers, and those that make the host wait for the device."""

    WAITS = ("_linalg_check_errors", "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.random: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in self.WAITS:
            self.waits.append(name)
        if torch.Tag.nondeterministic_seeded in func.tags:
            names = [argument.name for argument in func._schema.arguments]
            given = {a.name: a.default_value for a in func._schema.arguments} | dict(zip(names, args)) | (kwargs or {})
            if given.get("dropout_p") != 0:  # attention without dropout carries the tag, too
                self.random.append(name)
        return func(*args, **(kwargs or {}))


def watched(model: nn.Module, image_size: int) -> Watched:
    """Returns what is seen in a forward pass in training; computes nothing.

    Raises what a pass raises that reads values, since there are none.
    """
    with Dataless(at_most=True), dataless_tensors(model), Watched() as seen, torch.no_grad():
        train_mode(model)
        dtype = next(model.parameters()).dtype
        model(torch.empty(2, 3, image_size, image_size, dtype=dtype))
    return seen
