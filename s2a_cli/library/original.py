"""Remembers a model as it was found: its modules, hooks, flags and the tensors that are about to be trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2a_cli.common.norms import is_batch_norm

# The tables of a module: what it holds, and the hooks around its calls.
TABLES = (
    *("_modules", "_parameters", "_buffers"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)


@dataclass
class Tables:
    """Holds the tables of one module, each with a copy of what is in it, and whether the module was in training."""

    tables: dict[str, tuple[dict[Any, Any], dict[Any, Any]]]
    training: bool


class Original:
    """Holds what a model is before something is attached to it, and puts it back.

    It keeps the tables themselves, so that the handles of hooks that were there before go on working.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._modules = {
            module: Tables(
                {name: (table, dict(table)) for name in TABLES for table in [getattr(module, name)]}, module.training
            )
            for module in model.modules()
        }
        # By their places: load_state_dict(assign=True) puts other parameters there.
        self._flags = [
            (module, name, parameter.requires_grad)
            for module in self._modules
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        ]
        self._values: list[tuple[Tensor, Tensor]] = []  # a tensor of the model, and a copy of it

    def keep_values(self, names: Iterable[str]) -> None:
        """Copies the tensors of these names that were there before: their values come back, too."""
        before = {id(tensor) for module in self._modules.values() for tensor in self._tensors(module)}
        state = self.model.state_dict(keep_vars=True)
        self._values = [(state[name], state[name].detach().clone()) for name in names if id(state[name]) in before]

    @staticmethod
    def _tensors(module: Tables) -> list[Tensor]:
        """Returns the parameters and buffers that a module had."""
        tables = (module.tables[name][1] for name in ("_parameters", "_buffers"))
        return [tensor for table in tables for tensor in table.values() if tensor is not None]

    def has_more_hooks(self) -> bool:
        """Tells whether something reads what the model returns that did not before."""
        table, content = self._modules[self.model].tables["_forward_hooks"]
        return len(table) > len(content)

    def put_back_flags(self) -> None:
        """Has the parameters of before require a gradient as they did then."""
        for module, name, flag in self._flags:
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                parameter.requires_grad_(flag)

    def free_norms(self) -> None:
        """Has BatchNorms follow the mode of the model again, but those that did not when the model was found."""
        was_training = self._modules[self.model].training
        for norm in filter(is_batch_norm, self._modules):
            if self._modules[norm].training or not was_training:
                norm.train(self.model.training)

    def owners(self) -> set[nn.Module]:
        """Returns the modules that had parameters of their own."""
        return {module for module, _, _ in self._flags}

    @torch.no_grad()
    def put_back(self) -> None:
        """Makes the model what it was. Its tensors stay on the device and of the dtype that they have now."""
        for tensor, value in self._values:
            tensor.copy_(value)
        for module, found in self._modules.items():
            for name, (table, content) in found.tables.items():
                if name == "_buffers":  # to move or convert a module makes other buffers; parameters stay the same
                    content = {key: _like(buffer, getattr(module, name).get(key)) for key, buffer in content.items()}
                table.clear()
                table.update(content)
                setattr(module, name, table)
            module.training = found.training
        self.put_back_flags()


def _like(found: Tensor | None, now: Tensor | None) -> Tensor | None:
    """Returns a buffer as it was found, with the dtype and on the device of what is in its place now."""
    return found if found is None or now is None else found.to(now)
