"""A timm model (or a checkpoint of one) as a Backbone: its blocks, the layout of their hidden states, its head, its images.

Nothing outside this file asks which family a backbone belongs to. The blocks are found through timm's own
`group_matcher`, the layouts and the order of execution by one dry forward pass, the head through `get_classifier`.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from s2a_cli.config import BackboneConfig
from s2a_cli.data.transforms import ImageConfig
from s2a_cli.errors import UserError, nearest
from s2a_cli.tail import Tail

EMBEDDED = "embedded:"  # prefix of a checkpoint that ships in s2a_cli/weights/
ADDED = "s2a"  # the submodule of the model that holds what a method adds


@dataclass(frozen=True)
class Hidden:
    """A hidden state: its layout and its shape without the batch.

    tokens: [B, N, C], of which the first `prefix` are class or register tokens; channels_last: [B, H, W, C];
    channels_first: [B, C, H, W].
    """

    layout: str
    shape: tuple[int, ...]
    prefix: int = 0

    @property
    def channels(self) -> int:
        return self.shape[0] if self.layout == "channels_first" else self.shape[-1]

    @property
    def positions(self) -> int:
        return math.prod(self.shape) // self.channels

    def from_tokens(self, x: Tensor) -> Tensor:
        """[..., N, C] in this layout: [..., N, C], [..., H, W, C] or [..., C, H, W]."""
        if self.layout == "channels_first":
            x = x.transpose(-1, -2)
        return x.reshape(*x.shape[:-2], *self.shape)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A hidden state as its prefix tokens [B, P, C] and its map [B, C, H, W]; without a square grid, [B, C, N, 1]."""
        if self.layout == "channels_first":
            return x.new_empty(x.shape[0], 0, self.channels), x
        if self.layout == "channels_last":
            return x.new_empty(x.shape[0], 0, self.channels), x.permute(0, 3, 1, 2)
        tokens = x[:, self.prefix :].transpose(1, 2)
        side = math.isqrt(tokens.shape[-1])
        square = (side, side) if side * side == tokens.shape[-1] else (tokens.shape[-1], 1)
        return x[:, : self.prefix], tokens.unflatten(-1, square)


@dataclass(frozen=True)
class Block:
    """One of a backbone's repeated blocks, with the hidden states at its input and at its output."""

    name: str
    module: nn.Module
    input: Hidden
    output: Hidden


class Backbone:
    """A classification model seen as stem, blocks and head; every parameter but the head's is frozen.

    `model` is the one nn.Module; modules that a method adds live in `model.s2a` and act through forward hooks.
    """

    def __init__(self, model: nn.Module, image: ImageConfig):
        self.model, self.image = model, image
        self.head = model.get_classifier()
        if not isinstance(self.head, nn.Linear):
            raise UserError(f"backbone: {type(model).__name__} has no single linear classifier, so it can't be fine-tuned here")
        model.requires_grad_(False)
        self.head.requires_grad_(True)
        self.blocks, self._order = _trace(model, image.size)
        self.tail: Tail | None = None  # the trained part alone, where the config trains on kept taps
        self.stored = 0  # elements of weights that are kept as codes and so are no parameters, see frozen.py
        self._pretrained = [name for name in model.state_dict() if not name.startswith(f"{self.head_name}.")]

    @property
    def head_name(self) -> str:
        return next(name for name, module in self.model.named_modules() if module is self.head)

    @property
    def block_modules(self) -> list[nn.Module]:
        return [block.module for block in self.blocks]

    def adapted_blocks(self, blocks: str) -> list[Block]:
        """The blocks that `all` or `last:K` names, in order. Raises UserError when there are fewer than K."""
        if blocks == "all":
            return self.blocks
        match = re.fullmatch(r"last:([1-9]\d*)", blocks)
        if not match or int(match[1]) > len(self.blocks):
            raise UserError(f"method.blocks={blocks}: accepted are all and last:1 to last:{len(self.blocks)} for this backbone")
        return self.blocks[-int(match[1]) :]

    def adapted_modules(self, blocks: str) -> Iterator[tuple[str, nn.Module]]:
        """Modules (with their names) that run in or after the first adapted block; with `all`, every module."""
        start = 0 if blocks == "all" else self._order[self.adapted_blocks(blocks)[0].name]
        for name, module in self.model.named_modules():
            if module is not self.head and not name.startswith(f"{ADDED}.") and self._order.get(name, -1) >= start:
                yield name, module

    def runs(self, name: str) -> bool:
        """Whether the forward of the module with this name is called, rather than its tensors read by its parent."""
        return self._order[name] != self._order.get(name.rpartition(".")[0], 0)

    def add(self, name: str, module: nn.Module) -> None:
        """Adds a trainable module as `model.s2a.<name>`; it is saved and trained with the run."""
        if not hasattr(self.model, ADDED):
            self.model.add_module(ADDED, nn.ModuleDict())
        getattr(self.model, ADDED)[name] = module.to(next(self.head.parameters()).device)

    def fingerprint(self) -> str:
        """12 hex digits of the SHA-256 of the pretrained tensors, the head's and the added ones left out."""
        digest, state = hashlib.sha256(), self.model.state_dict()
        for name in self._pretrained:
            digest.update(name.encode())
            digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:12]

    def count(self) -> dict[str, float]:
        """Parameters: total, trainable (head apart), head, and trainable as percent of the backbone without its head."""
        head = sum(p.numel() for p in self.head.parameters())
        added = sum(p.numel() for p in getattr(self.model, ADDED, nn.Module()).parameters())
        total = sum(p.numel() for p in self.model.parameters()) + self.stored
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad) - head
        return {"total": total, "trainable": trainable, "head": head, "percent": 100 * trainable / (total - head - added)}


def build(config: BackboneConfig, num_classes: int, *, meta: bool = False) -> Backbone:
    """The backbone of a config with a new head for `num_classes`, on the CPU, its pretrained weights loaded.

    meta: on the meta device and without weights, for predictions. Raises UserError for an unknown model, arguments or an
    image size that it does not take, weights that can't be had, and a checkpoint that does not fit.
    """
    if not meta:
        return _build(config, num_classes, meta)
    key = repr(config), num_classes
    if key not in _HOLLOW:
        if len(_HOLLOW) >= KNOWN:
            del _HOLLOW[next(iter(_HOLLOW))]
        _HOLLOW[key] = _build(config, num_classes, meta)
    return copy.deepcopy(_HOLLOW[key])  # ten times faster than another


_HOLLOW: dict[tuple[str, int], Backbone] = {}  # backbones on the meta device as they were built
KNOWN = 4  # at most: a prediction is of a run and of full fine-tuning, a table's rows mostly of one backbone


def _build(config: BackboneConfig, num_classes: int, meta: bool) -> Backbone:
    from_hub = config.pretrained and not config.checkpoint and not meta
    with torch.device("meta" if meta else "cpu"):
        model = _create(config, num_classes, from_hub)
        if config.checkpoint and config.pretrained and not meta:
            load_checkpoint(model, config.checkpoint)
        image = _image_config(model, config)
        _set_image_size(model, image.size, config)
    return Backbone(model, image)


def _set_image_size(model: nn.Module, size: int, config: BackboneConfig) -> None:
    native = config.kwargs.get("img_size", model.pretrained_cfg["input_size"][-1])
    if size == native:
        return
    if hasattr(model, "set_input_size"):  # resamples position embeddings, sets windows
        try:
            model.set_input_size(img_size=(size, size))
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f"backbone.image_size={size}: {config.timm} can't take it: {error}") from None
    elif model.pretrained_cfg.get("fixed_input_size"):
        raise UserError(f"backbone.image_size={size}: {config.timm} takes {native} only")


def _create(config: BackboneConfig, num_classes: int, from_hub: bool) -> nn.Module:
    architecture = config.timm.split(".")[0]
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise UserError(f"backbone: timm has no model {config.timm!r}{nearest(architecture, known)}; `s2a ls backbones` lists ours")

    def create(pretrained: bool) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timm.create_model(config.timm, pretrained=pretrained, num_classes=num_classes, **config.kwargs)

    try:
        if not from_hub:
            return create(pretrained=False)
        with torch.device("meta"):  # settings that timm refuses are not a matter of the weights
            model = create(pretrained=False)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"backbone: timm can't make {config.timm}: {_first_line(error)}") from None
    try:
        return create(pretrained=True)
    except RuntimeError as error:
        if "Error(s) in loading state_dict" in str(error):
            mismatch = " ".join(str(error).split())[:400]
            raise UserError(f"backbone: the weights of {config.timm} do not fit backbone.kwargs={config.kwargs}: {mismatch}") from None
        raise _not_downloaded(config, model, error) from error
    except Exception as error:  # the hub raises many kinds: offline, not found, gated, disk full
        raise _not_downloaded(config, model, error) from error


def _not_downloaded(config: BackboneConfig, model: nn.Module, error: Exception) -> UserError:
    where = model.pretrained_cfg.get("hf_hub_id") or model.pretrained_cfg.get("url") or "no known address"
    return UserError(
        f"backbone: the weights of {config.timm} ({where}) could not be downloaded"
        f" ({type(error).__name__}); give them as backbone.checkpoint=FILE, or backbone.pretrained=false for random weights"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]


def _image_config(model: nn.Module, config: BackboneConfig) -> ImageConfig:
    default = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)

    def pick(key: str, value):
        given = getattr(config, key)
        return value if given is None else given

    return ImageConfig(
        size=pick("image_size", config.kwargs.get("img_size", default["input_size"][-1])),
        mean=tuple(pick("mean", default["mean"])),
        std=tuple(pick("std", default["std"])),
        interpolation=pick("interpolation", default["interpolation"]),
        crop_pct=pick("crop_pct", default["crop_pct"]),
    )


def _trace(model: nn.Module, image_size: int) -> tuple[list[Block], dict[str, int]]:
    """The blocks with their hidden states, and for each module its place in the order of execution (the root is at 0)."""
    patterns = _block_patterns(model)
    modules = [(n, m) for n, m in model.named_modules() if any(re.fullmatch(p.rstrip("$"), n) for p in patterns)]
    if not modules:
        raise UserError(f"backbone: timm does not say where the blocks of {type(model).__name__} are")
    order: dict[str, int] = {}
    states: dict[str, tuple[Tensor, Tensor]] = {}
    names = {module: name for name, module in model.named_modules()}

    def begins(module: nn.Module, _) -> None:
        order.setdefault(names[module], len(order))

    def ends(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        states[names[module]] = inputs[0], output

    handles = [module.register_forward_pre_hook(begins) for module in names]
    handles += [module.register_forward_hook(ends) for _, module in modules]
    training = model.training
    parameter = next(model.parameters())
    image = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.no_grad():
            model.eval()(image)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"backbone.image_size={image_size}: {type(model).__name__} can't take it: {_first_line(error)}") from None
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    # A module that runs only through a parent's own arithmetic takes the place of that parent.
    for name in names.values():
        if name not in order:
            order[name] = order.get(name.rpartition(".")[0], 0)
    ran = [(n, m) for n, m in modules if n in states]
    ran.sort(key=lambda item: order[item[0]])
    return [Block(n, m, _hidden(model, states[n][0]), _hidden(model, states[n][1])) for n, m in ran], order


def _block_patterns(model: nn.Module) -> list[str]:
    """timm's regular expressions for the names of a model's blocks (those that its layer decay counts one by one)."""
    matcher = model.group_matcher(coarse=False) if hasattr(model, "group_matcher") else {}
    patterns = matcher.get("blocks", []) if isinstance(matcher, dict) else []
    if isinstance(patterns, str):
        return [patterns]
    return [pattern for pattern, fixed in patterns if fixed is None]


def _hidden(model: nn.Module, x: Tensor) -> Hidden:
    if not isinstance(x, Tensor) or x.ndim not in (3, 4):
        raise UserError(f"backbone: the blocks of {type(model).__name__} do not pass one tensor [B, N, C] or [B, C, H, W] on")
    if x.ndim == 3:
        return Hidden("tokens", tuple(x.shape[1:]), prefix=getattr(model, "num_prefix_tokens", 0))
    layout = "channels_last" if getattr(model, "output_fmt", "NCHW") == "NHWC" else "channels_first"
    return Hidden(layout, tuple(x.shape[1:]))


def load_checkpoint(model: nn.Module, checkpoint: str) -> None:
    """Loads pretrained tensors from a file (.safetensors, .pth or a ViT's .npz); a head in it is left out.

    Formats other than timm's own go through timm's filter for the family. Raises UserError for a file that is missing,
    damaged, or does not fit; the message lists missing and unexpected keys.
    """
    embedded = checkpoint.startswith(EMBEDDED)
    path = Path(__file__).parent / "weights" / checkpoint.removeprefix(EMBEDDED) if embedded else Path(checkpoint).expanduser()
    if not path.is_file():
        raise UserError(f"backbone.checkpoint={checkpoint}: no such file")
    if path.suffix == ".npz":
        return _load_npz(model, path)
    state = _read_tensors(path)
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt:
        try:
            state = adapt(state, model)
        except (KeyError, RuntimeError, AttributeError, IndexError, ValueError):
            pass  # another family's keys: reported below by name
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    heads = tuple(f"{name}." for name in classifiers)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(heads)}
    state = {k: v for k, v in state.items() if not k.startswith(heads)}
    counters = tuple(k for k in {**own, **state} if k.endswith("num_batches_tracked"))  # older files have none
    missing = [k for k in own if k not in state and k not in counters]
    unexpected = sorted(k for k in state if k not in own and k not in counters)
    shapes = [f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}" for k, v in state.items() if k in own and v.shape != own[k].shape]
    if missing or unexpected or shapes:
        parts = {"missing": missing, "unexpected": unexpected, "other shapes": shapes}
        said = "; ".join(f"{len(keys)} {what}: {_few(keys)}" for what, keys in parts.items() if keys)
        raise UserError(f"backbone.checkpoint={checkpoint} is not of {type(model).__name__} as configured: {said}")
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items() if k in own}, strict=False)


def _few(keys: list[str], most: int = 6) -> str:
    return ", ".join(keys[:most]) + (f", and {len(keys) - most} more" if len(keys) > most else "")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile, pickle and torch raise kinds of their own for a damaged file
        reason = _first_line(error)
        raise UserError(f"backbone.checkpoint={path}: can't be read as tensors, damaged or of another format ({reason})") from None
    while isinstance(content, dict) and not any(isinstance(v, Tensor) for v in content.values()):
        wrapped = next((content[k] for k in ("state_dict_ema", "model_ema", "state_dict", "model", "teacher") if k in content), None)
        if wrapped is None:
            break
        content = wrapped
    if not isinstance(content, dict):
        raise UserError(f"backbone.checkpoint={path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return {k.removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}


def _load_npz(model: nn.Module, path: Path) -> None:
    if not hasattr(model, "load_pretrained"):
        raise UserError(f"backbone.checkpoint={path}: {type(model).__name__} has no .npz format; use .safetensors or .pth")
    head = model.get_classifier()
    own = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    try:
        with np.load(path) as arrays:
            blocks = {name.split("/")[1] for name in arrays.files if name.startswith("Transformer/encoderblock_")}
        if len(blocks) > len(model.blocks):
            raise UserError(
                f"backbone.checkpoint={path} is not of {type(model).__name__} as configured:"
                f" it has {len(blocks)} blocks, the model {len(model.blocks)}"
            )
        model.load_pretrained(str(path))
    except KeyError as error:
        raise UserError(f"backbone.checkpoint={path} is not of {type(model).__name__} as configured: lacks {error}") from None
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"backbone.checkpoint={path}: can't be loaded into {type(model).__name__} ({_first_line(error)})") from None
    head.load_state_dict(own)  # timm takes the file's head where the number of classes is the same
