"""Attaches a method to a model of one's own: what trains, its loss, its parameter groups, and the ways back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from s2a_cli import methods
from s2a_cli.activations import module_list
from s2a_cli.activations.sites import is_compiled
from s2a_cli.backbones.backbone import ADDED, Added, Backbone
from s2a_cli.backbones.given import of_module
from s2a_cli.backbones.trace import Sample
from s2a_cli.common.arguments import check_type, described
from s2a_cli.common.errors import UserError
from s2a_cli.common.hooks import sets_modes_only
from s2a_cli.common.text import listed
from s2a_cli.config.compose import compose_method
from s2a_cli.library.original import Original
from s2a_cli.memory.predict import inputs_of
from s2a_cli.methods import Attachment
from s2a_cli.methods.parts.deep_supervision import losses_of, mean_logits
from s2a_cli.training.checkpoints import trained_names
from s2a_cli.training.step import batch_norms, hold_norms, parameter_groups, trains

_taken: WeakSet[nn.Module] = WeakSet()  # modules with parameters, of models to which something is attached
Criterion = Callable[[Tensor, Tensor], Tensor]  # criterion(logits [B, classes], targets) returns a scalar


class TrainingOutput(nn.Module):
    """Makes a model return one [B, classes] in training, and keeps frozen BatchNorms on their statistics.

    reads_logits: whether hooks of the method read what the model returns.
    """

    def __init__(self, votes: bool, holds_norms: bool, reads_logits: bool):
        super().__init__()
        self.votes, self.holds_norms, self.reads_logits = votes, holds_norms, reads_logits
        self.last_hook: RemovableHandle | None = None  # unpickled, it has later hooks get numbers of their own

    @sets_modes_only
    def on_inputs(self, model: nn.Module, args: Any) -> None:
        """Holds the frozen BatchNorms, which model.train() sets free. A forward pre-hook of the model.

        Recomputed blocks look at the modes of their BatchNorms before these are called.
        """
        if self.holds_norms and model.training:
            hold_norms(model)

    @sets_modes_only
    def on_norm_input(self, norm: Any, args: Any) -> None:
        """Holds a frozen BatchNorm also where a part of the model is called. A forward pre-hook of it."""
        if norm.training and not trains(norm):
            norm.eval()

    def on_logits(self, model: nn.Module, args: Any, output: Any) -> None:
        """Refuses what the method can't read, such as the outputs of auxiliary heads. The model's first forward hook.

        Raises UserError.
        """
        if self.reads_logits and not isinstance(output, Tensor):
            raise UserError(
                f"{type(model).__name__} returned a {type(output).__name__}, and what is attached to it reads logits"
                " [B, classes]: have it return these alone, in training too (of timm: set_distilled_training(False))"
            )

    def on_output(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Averages the logits of several heads. A forward hook of the model."""
        several = isinstance(output, Tensor) and output.ndim == 3
        return mean_logits(output) if several and not self.votes else output


class Attached:
    """A model with a method attached to it, as `attach` returns it.

    model: the module that was given, changed in place: call it, move it, compile it, put it into any loop. blocks: its
    repeated blocks in order, for `compress_activations` and `checkpointed`. attachment: what the loop of `s2a train`
    knows of it. It can be copied and pickled as a whole. After `merge` or `detach` it is over: what would change or
    save the model then raises UserError.
    """

    _over = ""  # why it is no longer attached

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
        self._check_attached()
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
        self._check_attached()
        names, state = self._changed(), self.model.state_dict()
        return {name: state[name].detach().cpu().clone() for name in state if name in names}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the tensors of `state_dict` into the model: just those that trained from the start or train now.

        Raises UserError where they are of another model or method; the model is then untouched.
        """
        self._check_attached()
        check_type("state", state, Mapping, "the tensors that state_dict() returned")
        own = self.model.state_dict()
        if odd := self._odd_names(state.keys(), own.keys()):
            raise UserError(f"these tensors are not of this model and method: the state {odd}")
        for name, tensor in state.items():
            check_type(name, tensor, Tensor, "a tensor")
            if tensor.shape != own[name].shape:
                raise UserError(f"{name}: {list(tensor.shape)} in the state, {list(own[name].shape)} in the model")
        for name, tensor in state.items():
            own[name].copy_(tensor)

    def merge(self) -> nn.Module:
        """Returns the model with all that was trained in its own weights, and nothing else of the method left in it.

        Parameters require a gradient as they did before. Raises UserError where no weight of the model can hold what
        was added, such as a side branch; the model then stays as it is.
        """
        self._check_attached()
        model = self.attachment.merge()
        self._original.put_back_flags()
        self._original.free_norms()
        _taken.difference_update(self._original.owners())
        self._over = "merge(): its own weights now hold what was trained"
        return model

    def detach(self) -> nn.Module:
        """Returns the model as it was found: modules, hooks, flags, mode, and the values of what was trained.

        Parameters that were unfrozen by hand afterwards keep their values.
        """
        self._check_attached()
        self._original.put_back()
        _taken.difference_update(self._original.owners())
        self._over = "detach(): it is as it was found"
        return self.model

    def _check_attached(self) -> None:
        """Raises UserError where the model was given back: by now it may be trained or attached to in another way."""
        if self._over:
            raise UserError(
                f"nothing of this is attached to the {type(self.model).__name__} any more since {self._over}; attach to"
                " it again"
            )

    def _odd_names(self, names: Set[str], own: Set[str]) -> str:
        """Returns what is wrong with the names of a state; empty where nothing is. own: those of the model's state."""
        if missing := sorted(self._names - names):
            return f"lacks {listed(missing, 3)}"
        if unknown := sorted(names - own):
            return f"has {listed(unknown, 3)}, which the model has not"
        frozen = sorted(names - self._changed())
        return f"has {listed(frozen, 3)}, frozen here; requires_grad_(True) thaws what was thawed" if frozen else ""

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
    head: the name of its classifier, a linear layer or a 1 x 1 convolution, whose output is what the model returns; by
        default the last one that runs.
    adapt: "all" blocks or the "last:K", which is `method.blocks` on the command line.
    votes: structures such as `side` train several classifiers, votes. In training the model returns the mean of their
        logits, [B, classes], with which any loss works. Its cross entropy is the mean of the votes' cross entropies
        less their disagreement, -log sum_c prod_v p_v(c)^(1 / votes) >= 0, which knows no targets. With votes=True it
        returns the logits of each, [votes, B, classes], for `Attached.loss`. In evaluation [B, classes] either way.
    settings: the method's, as on the command line: side={"heads": 2}; with several structures under their names.

    Frozen BatchNorms stay on their statistics in training. Raises UserError, a line for each problem, for what does not
    fit; the model is then as it was.
    """
    names = [method] if isinstance(method, str) else method
    _check_arguments(model, names, blocks, head)
    names = list(names)
    if adapt is not None:
        settings = _adapting(names, settings, adapt)
    config = compose_method(names, settings)
    _check_model(model)
    original = Original(model)
    try:
        sample = None if inputs is None else _sample(model, inputs)
        backbone = of_module(model, sample=sample, head=head, blocks=[] if blocks is None else module_list(blocks))
        dtypes = _dtypes(backbone)
        with _made_where(model):
            attachment = methods.attach(config, backbone)
        if attachment.after_step:
            raise UserError(f"method={config.name} acts between steps, in the loop of s2a train alone")
        _add_output(backbone, votes, reads_logits=original.has_more_hooks())
        _convert_added(backbone, dtypes)
    except BaseException:
        original.put_back()
        raise
    attached = Attached(attachment, original, config.lr)
    _taken.update(original.owners())
    original.keep_values(trained_names(model))
    return attached


def _check_arguments(
    model: nn.Module, names: Sequence[str], blocks: Iterable[nn.Module] | None, head: str | None
) -> None:
    """Raises UserError for arguments of `attach` that are of another type."""
    check_type("model", model, nn.Module, "a torch.nn.Module")
    check_type("method", names, Sequence, "a name or several")
    for name in names:
        check_type("method", name, str, "a name or several")
    check_type("head", head, (str, type(None)), "the name of the classifier")
    if isinstance(blocks, str):
        raise UserError(f"blocks={blocks}: expected the modules themselves; adapt= chooses among them")


def _check_model(model: nn.Module) -> None:
    """Raises UserError for a model to which nothing can be attached."""
    kind, modules = type(model).__name__, list(model.modules())
    if hasattr(model, ADDED) or any(isinstance(module, Added) for module in modules):
        raise UserError(f"{kind} has something attached to it: attached.detach() or merge() it first")
    if not _taken.isdisjoint(modules):
        raise UserError(
            f"{kind}: something is attached to another model that has modules of this one: detach() or merge() it,"
            " or attach to a copy.deepcopy of this one"
        )
    if is_compiled(model):
        raise UserError("a compiled model: attach to the model itself, and compile it then")
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        raise UserError("a model that torch.jit has scripted or traced: attach to the module that it was made of")
    tensors = [*model.parameters(), *model.buffers()]
    if any(map(is_lazy, tensors)):
        raise UserError(f"{kind} has lazy modules, whose parameters have no shapes yet: call it once before")
    if torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in tensors):
        raise UserError(f"{kind}: nothing can train that is made within torch.inference_mode: leave it before")


def _made_where(model: nn.Module) -> AbstractContextManager[Any]:
    """Has tensors be made where a model is, in place of another default device than the CPU, whose tensors move."""
    return nullcontext() if torch.get_default_device().type == "cpu" else next(model.parameters()).device


def _sample(model: nn.Module, inputs: Tensor | Sequence[Tensor] | Sequence[int]) -> Sample:
    """Returns what a model is called with for one sample, as `attach` is told. Raises UserError."""
    try:
        return tuple(x[0].to("meta") for x in inputs_of(model, inputs))
    except (ValueError, TypeError, IndexError):
        raise UserError(
            f"inputs: expected tensors of at least one sample, or a shape such as (1, 3, 224, 224), not"
            f" {described(inputs)}"
        ) from None


def _adapting(names: list[str], settings: dict[str, Any], adapt: str) -> dict[str, Any]:
    """Returns the settings with which each structure that adapts blocks adapts these.

    Raises UserError where none does, and for settings of one that are none.
    """
    known = {name: methods.STRUCTURES[name].Settings for name in names if name in methods.STRUCTURES}
    having = [name for name, kind in known.items() if "blocks" in {field.name for field in fields(kind)}]
    if not having:
        raise UserError(f"adapt={adapt}: method={'+'.join(names)} adapts no blocks")
    if len(names) == 1:
        return settings | {"blocks": adapt}
    for name in having:
        check_type(name, settings.get(name, {}), Mapping, "settings {name: value}")
    return settings | {name: {**settings.get(name, {}), "blocks": adapt} for name in having}


def _add_output(backbone: Backbone, votes: bool, reads_logits: bool) -> None:
    """Registers what makes one output of several in training."""
    model, norms = backbone.model, batch_norms(backbone.model)
    backbone.add("output", output := TrainingOutput(votes, bool(norms), reads_logits))
    model.get_submodule(ADDED).train(model.training)
    model.register_forward_pre_hook(output.on_inputs)
    for norm in norms:
        norm.register_forward_pre_hook(output.on_norm_input)
    model.register_forward_hook(output.on_logits, prepend=True)
    output.last_hook = model.register_forward_hook(output.on_output)


def _dtypes(backbone: Backbone) -> list[torch.dtype]:
    """Returns the dtype of the classifier, and that of the blocks where it is another; these work without autocast."""
    own = next(backbone.head.parameters()).dtype
    inner = (p.dtype for block in backbone.block_modules for p in block.parameters() if p.is_floating_point())
    found = next(inner, own)
    return [own] if found == own or backbone.problem() else [own, found]


def _convert_added(backbone: Backbone, dtypes: Sequence[torch.dtype]) -> None:
    """Gives added modules the first of these dtypes in which they compute. Raises UserError where there is none."""
    kind, problem = type(backbone.model).__name__, ""
    for dtype in dtypes:
        backbone.model.get_submodule(ADDED).to(dtype)
        problem = backbone.problem() if len(dtypes) > 1 else ""
        if not problem:
            return
    raise UserError(
        f"{kind} is of {' and '.join(map(str, dtypes))}, in neither of which what is attached to it computes"
        f" ({problem}): convert the model to one of them"
    )
