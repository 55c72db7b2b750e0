"""Attaches a method to a model of one's own: what trains, its loss, its parameter groups, and the ways back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2a_cli import methods
from s2a_cli.activations.sites import is_compiled
from s2a_cli.backbones.backbone import ADDED, Backbone
from s2a_cli.backbones.given import of_module
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import listed
from s2a_cli.config.compose import compose_method
from s2a_cli.library.original import Original
from s2a_cli.memory.predict import inputs_of
from s2a_cli.methods import Attachment
from s2a_cli.methods.parts.deep_supervision import losses_of, mean_logits
from s2a_cli.training.checkpoints import trained_names
from s2a_cli.training.step import batch_norms, hold_norms, parameter_groups

Criterion = Callable[[Tensor, Tensor], Tensor]  # criterion(logits [B, classes], targets) returns a scalar


class TrainingOutput(nn.Module):
    """Makes a model return one [B, classes] in training, and keeps frozen BatchNorms on their statistics."""

    def __init__(self, votes: bool, holds_norms: bool):
        super().__init__()
        self.votes, self.holds_norms = votes, holds_norms

    def on_inputs(self, model: nn.Module, args: Any) -> None:
        """Holds the frozen BatchNorms, which model.train() sets free. A forward pre-hook of the model."""
        if self.holds_norms and model.training:
            hold_norms(model)

    def on_output(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Averages the logits of several heads. A forward hook of the model."""
        several = isinstance(output, Tensor) and output.ndim == 3
        return mean_logits(output) if several and not self.votes else output


class Attached:
    """A model with a method attached to it, as `attach` returns it.

    model: the module that was given, changed in place: call it, move it, compile it, put it into any loop. blocks: its
    repeated blocks in order, for `compress_activations` and `checkpointed`. attachment: what the loop of `s2a train`
    knows of it. It can be copied and pickled as a whole.
    """

    def __init__(self, attachment: Attachment, original: Original, lr: float):
        self.attachment, self._original, self._lr = attachment, original, lr
        self._names = trained_names(attachment.model)

    def __repr__(self) -> str:
        count = self.count()
        return (
            f"Attached({type(self.model).__name__}: {count['trainable']:,} parameters and {count['head']:,} of the head"
            f" train, {len(self.blocks)} blocks)"
        )

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.attachment.model

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of the model, in order."""
        return self.attachment.blocks

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name in the model, parameter) of what trains now."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields what trains now, for clipping and for an optimiser of one group."""
        return (parameter for _, parameter in self.named_parameters())

    def count(self) -> dict[str, float]:
        """Returns numbers of parameters: total, trainable (without the head), head, and percent of the pretrained."""
        return self.attachment.backbone.count()

    def parameter_groups(self, lr: float | None = None, weight_decay: float = 1e-4) -> list[dict[str, Any]]:
        """Returns groups for any optimiser: torch.optim.AdamW(attached.parameter_groups()).

        lr: the learning rate, by default the method's own for AdamW; parts whose rate is another have theirs times
        this. weight_decay: of weight matrices; biases, norms and prompts have none.
        """
        rate = self._lr if lr is None else lr
        return parameter_groups(self.model, rate, weight_decay, self.attachment.learning_rates)

    def loss(self, output: Tensor, targets: Tensor, criterion: Criterion = F.cross_entropy) -> Tensor:
        """Returns the loss of what the model returned, a scalar: of logits [B, classes], the criterion's.

        Of the logits of several votes [votes, B, classes], see `attach(votes=True)`, it is the sum of the criterion's
        of each: every vote learns as if it were alone.
        """
        return losses_of(output, targets, criterion).sum()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns copies on the CPU of the few tensors that training changes, by their names in the model.

        These are those that trained from the start and those that train now.
        """
        names, state = self._changed(), self.model.state_dict()
        return {name: state[name].detach().cpu().clone() for name in state if name in names}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the tensors of `state_dict` into the model. Raises UserError where they are of another model or method.

        The model is then as it was, or untouched.
        """
        own = self.model.state_dict()
        missing, unknown = sorted(self._names - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            odd = f"lacks {listed(missing, 3)}" if missing else f"has {listed(unknown, 3)}, which the model has not"
            raise UserError(f"these tensors are not of this model and method: the state {odd}")
        for name, tensor in state.items():
            if tensor.shape != own[name].shape:
                raise UserError(f"{name}: {list(tensor.shape)} in the state, {list(own[name].shape)} in the model")
        for name, tensor in state.items():
            own[name].copy_(tensor)

    def merge(self) -> nn.Module:
        """Returns the model with all that was trained in its own weights, and nothing else of the method left in it.

        Parameters require a gradient as they did before. Raises UserError where no weight of the model can hold what
        was added, such as a side branch; the model then stays as it is.
        """
        model = self.attachment.merge()
        self._original.put_back_flags()
        return model

    def detach(self) -> nn.Module:
        """Returns the model as it was found: modules, hooks, flags, mode, and the values of what was trained.

        Parameters that were unfrozen by hand afterwards keep their values.
        """
        self._original.put_back()
        return self.model

    def _changed(self) -> set[str]:
        """Returns the names of the tensors that trained from the start, or train now."""
        return (self._names | trained_names(self.model)) & self.model.state_dict().keys()


def attach(
    model: nn.Module,
    method: str | Sequence[str] = "s2a",
    *,
    inputs: Tensor | Sequence[Tensor] | Sequence[int] | None = None,
    blocks: Iterable[nn.Module] | None = None,
    head: str | None = None,
    adapt: str | None = None,
    votes: bool = False,
    **settings: Any,
) -> Attached:
    """Attaches a method to a model in place: freezes it, and adds or unfreezes what the method trains.

        attached = s2a_cli.attach(model, "s2a", prompt={"rank": 4})
        optimizer = torch.optim.AdamW(attached.parameter_groups())

    The model is any module that returns logits [B, classes] and has repeated blocks, of timm or not. Its classifier
    is trained with every method.

    method: a name that `s2a ls methods` lists, or several: ["bias", "side"].
    inputs: what the model is called with: one tensor or several (only shapes and dtypes are read), or a shape such as
        (1, 3, 224, 224); by default square images of the size that it was made for.
    blocks: its repeated blocks, such as model.layers; by default they are found by a forward pass without data.
    head: the name of its classifier, a linear layer or a 1 x 1 convolution; by default the last one that has an output
        for each class.
    adapt: "all" blocks or the "last:K", which is `method.blocks` on the command line.
    votes: structures such as `side` train several classifiers, votes. In training the model returns the mean of their
        logits, [B, classes], with which any loss works. Its cross entropy is the mean of the votes' cross entropies
        less their disagreement, -log sum_c prod_v p_v(c)^(1 / votes) >= 0, which knows no targets. With votes=True it
        returns the logits of each, [votes, B, classes], for `Attached.loss`. In evaluation [B, classes] either way.
    settings: the method's, as on the command line: side={"heads": 2}; with several structures under their names.

    Frozen BatchNorms stay on their statistics in training. Raises UserError, a line for each problem, for what does not
    fit; the model is then as it was.
    """
    if isinstance(blocks, str):
        raise UserError(f"blocks={blocks}: expected the modules themselves; adapt= chooses among them")
    names = [method] if isinstance(method, str) else list(method)
    if adapt is not None:
        settings = _adapting(names, settings, adapt)
    config = compose_method(names, settings)
    if hasattr(model, ADDED):
        raise UserError(f"{type(model).__name__} has something attached to it: attached.detach() or merge() it first")
    if is_compiled(model):
        raise UserError("a compiled model: attach to the model itself, and compile it then")
    original = Original(model)
    try:
        sample = None if inputs is None else tuple(x[0].to("meta") for x in inputs_of(model, inputs))
        backbone = of_module(model, sample=sample, head=head, blocks=list(blocks or ()))
        attachment = methods.attach(config, backbone)
        if attachment.after_step:
            raise UserError(f"method={config.name} acts between steps, in the loop of s2a train alone")
        _add_output(backbone, votes)
    except BaseException:
        original.put_back()
        raise
    attached = Attached(attachment, original, config.lr)
    original.keep_values(trained_names(model))
    return attached


def _adapting(names: list[str], settings: dict[str, Any], adapt: str) -> dict[str, Any]:
    """Returns the settings with which each structure that adapts blocks adapts these.

    Raises UserError where none does.
    """
    known = {name: methods.STRUCTURES[name].Settings for name in names if name in methods.STRUCTURES}
    having = [name for name, kind in known.items() if "blocks" in {field.name for field in fields(kind)}]
    if not having:
        raise UserError(f"adapt={adapt}: method={'+'.join(names)} adapts no blocks")
    if len(names) == 1:
        return settings | {"blocks": adapt}
    return settings | {name: {**settings.get(name, {}), "blocks": adapt} for name in having}


def _add_output(backbone: Backbone, votes: bool) -> None:
    """Registers what makes one output of several in training; added modules get the classifier's dtype."""
    model, weight = backbone.model, next(backbone.head.parameters())
    backbone.add("output", output := TrainingOutput(votes, holds_norms=bool(batch_norms(model))))
    model.get_submodule(ADDED).to(weight.dtype).train(model.training)
    model.register_forward_pre_hook(output.on_inputs)
    model.register_forward_hook(output.on_output)
