"""Makes the backbone of a config: the model from timm, its weights, its images, its head."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from omegaconf import OmegaConf
from timm.data.config import resolve_data_config
from torch import nn

from s2a_cli.backbones.backbone import Backbone
from s2a_cli.backbones.head import Classified, Head, find_head, pooled
from s2a_cli.backbones.hub import WeightsMissing, hub, is_known
from s2a_cli.backbones.pretrained import load_checkpoint, map_tensors, pretrained_cfg
from s2a_cli.common.dataless import Dataless
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import brief, first_line, nearest
from s2a_cli.config.schema import BackboneConfig
from s2a_cli.config.trust import check_names
from s2a_cli.data.transforms import ImageConfig
from s2a_cli.memory.predict import dataless_tensors


def build(config: BackboneConfig, num_classes: int, *, meta: bool = False) -> Backbone:
    """Returns the backbone of a config on the CPU, with pretrained weights and a new head for `num_classes`.

    meta: build it on the meta device and without weights, for predictions. Raises UserError for an unknown model,
    arguments or an image size that it does not take, weights that can't be had, and a checkpoint that does not fit.
    """
    if not meta:
        return _build(config, num_classes, meta)
    built = _remembered(_ON_META, (repr(config), num_classes), lambda: _build(config, num_classes, meta))
    return copy.deepcopy(built)  # ten times faster than to build another


_ON_META: dict[tuple, Backbone] = {}  # backbones on the meta device as they were built
_OTHERS: dict[tuple, nn.Module] = {}  # models of one class more on the meta device, which find_head compares with
KNOWN = 4  # of each at most: a prediction takes those of a run and of full fine-tuning; most tables have one backbone


def _remembered(known: dict[tuple, Any], key: tuple, make: Callable[[], Any]) -> Any:
    """Returns what was made for a key before, or makes it now; the oldest is forgotten for it."""
    if key not in known:
        made = make()
        if len(known) >= KNOWN:
            del known[next(iter(known))]
        known[key] = made
    return known[key]


def _build(config: BackboneConfig, num_classes: int, meta: bool) -> Backbone:
    """Does the work of build, always from the start."""
    from_hub = config.pretrained and not config.checkpoint and not meta
    other = _remembered(_OTHERS, (config.timm, repr(config.kwargs), num_classes), lambda: _other(config, num_classes))
    if not meta:
        _refuse_size(config, other)
    with torch.device("meta" if meta else "cpu"):
        model = _create(config, num_classes, from_hub)
        head = find_head(model, other, num_classes)
        if config.checkpoint and config.pretrained and not meta:
            load_checkpoint(model, config.checkpoint, list(head.layers))
        if config.weights == "offload" and config.pretrained and not meta:
            map_tensors(model, config.checkpoint or "")
        image = _image_config(model, config)
        _set_image_size(model, image.size, config)
        if not head.layers:
            model = classified = _classified(model, image.size, num_classes)
            head = Head({"head": classified.head}, num_classes)
    return Backbone(model, image, head)


def _other(config: BackboneConfig, num_classes: int) -> nn.Module:
    """Returns the model with one class more, on the meta device."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return _create(config, num_classes + 1, False)


def _refuse_size(config: BackboneConfig, model: nn.Module) -> None:
    """Raises UserError for a model whose weights alone take more than the memory of this machine."""
    need = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # this system does not tell
        return
    if need > there:
        raise UserError(
            f"backbone: the weights of {config.timm} with backbone.kwargs={brief(str(config.kwargs))} take"
            f" {need / 2**30:,.0f} GiB; this machine has {there / 2**30:,.0f} GiB of memory"
        )


def _classified(model: nn.Module, image_size: int, num_classes: int) -> Classified:
    """Adds a head to a model that has none. Raises UserError where it returns features of no known layout."""
    kind, parameter = type(model).__name__, next(model.parameters())
    try:
        with Dataless(), dataless_tensors(model), torch.no_grad():
            features = model(torch.empty(1, 3, image_size, image_size, dtype=parameter.dtype, device="cpu"))
            channels = pooled(features).shape[1]
    except Exception as error:  # models check their input in ways of their own
        raise UserError(f"backbone.image_size={image_size}: {kind} can't take it: {first_line(error)}") from None
    if channels != getattr(model, "num_features", channels):
        raise UserError(
            f"backbone: {kind} has no classifier, and returns features of another layout than [B, C], [B, N, C] or [B,"
            " C, H, W]"
        )
    return Classified(model, channels, num_classes)


def lacks_variance(backbone: Backbone, train: Callable[[nn.Module], None]) -> bool:
    """Tells whether a batch of one image leaves a BatchNorm one value a channel, with which it can't train.

    train: puts a model into training mode.
    """
    size, dtype = backbone.image.size, next(backbone.model.parameters()).dtype
    try:
        with Dataless(), dataless_tensors(backbone.model), torch.no_grad():
            train(backbone.model)
            backbone.model(torch.empty(1, 3, size, size, dtype=dtype, device="cpu"))
    except ValueError as error:
        return "more than 1 value per channel" in str(error)
    return False


def _set_image_size(model: nn.Module, size: int, config: BackboneConfig) -> None:
    """Sets the pixels of a side of the images. Raises UserError where the model can't take them."""
    native = config.kwargs.get("img_size", pretrained_cfg(model)["input_size"][-1])
    if size == native:
        return
    if set_input_size := getattr(model, "set_input_size", None):  # resamples position embeddings, sets windows
        try:
            set_input_size(img_size=(size, size))
        except Exception as error:  # models check their input in ways of their own
            raise UserError(f"backbone.image_size={size}: {config.timm} can't take it: {first_line(error)}") from None
    elif pretrained_cfg(model).get("fixed_input_size"):
        raise UserError(f"backbone.image_size={size}: {config.timm} takes {native} only")


def _create(config: BackboneConfig, num_classes: int, from_hub: bool) -> nn.Module:
    """Makes the model of timm, with its pretrained weights where they are to come from the hub. Raises UserError."""
    architecture = config.timm.split(".")[0]
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise UserError(
            f"backbone: timm has no model {config.timm!r}{nearest(architecture, known)}; `s2a ls backbones` lists ours"
        )

    check_names(architecture, config.kwargs)
    kwargs: Any = OmegaConf.to_container(config.kwargs) if OmegaConf.is_config(config.kwargs) else config.kwargs

    def create(pretrained: bool) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timm.create_model(config.timm, pretrained=pretrained, num_classes=num_classes, **kwargs)

    try:
        if not from_hub:
            return create(pretrained=False)
        with torch.device("meta"):  # fails for settings that timm refuses, before weights are downloaded
            model = create(pretrained=False)
    except Exception as error:  # models check their settings in ways of their own
        raise UserError(f"backbone: timm can't make {config.timm}: {first_line(error)}") from None
    with hub() as unreachable:
        repository = pretrained_cfg(model).get("hf_hub_id")
        if unreachable and repository and not is_known(repository):  # to make the model first takes seconds
            raise _not_downloaded(config, model, unreachable)
        try:
            return create(pretrained=True)
        except Exception as error:  # the hub raises many kinds: offline, not found, gated, disk full
            if "Error(s) in loading state_dict" in str(error):
                mismatch = " ".join(str(error).split())[:400]
                raise UserError(
                    f"backbone: the weights of {config.timm} do not fit backbone.kwargs={config.kwargs}: {mismatch}"
                ) from None
            raise _not_downloaded(config, model, unreachable or type(error).__name__) from error


def _not_downloaded(config: BackboneConfig, model: nn.Module, why: str) -> WeightsMissing:
    """Returns the error for weights that could not be downloaded, with what to do instead."""
    known = pretrained_cfg(model)
    where = known.get("hf_hub_id") or known.get("url") or "no known address"
    return WeightsMissing(
        f"backbone: the weights of {config.timm} ({where}) could not be downloaded ({why}); give them"
        " as backbone.checkpoint=FILE, or backbone.pretrained=false for random weights"
    )


def _image_config(model: nn.Module, config: BackboneConfig) -> ImageConfig:
    """Returns the images that a model was pretrained on, with what the config says otherwise."""
    default = resolve_data_config(pretrained_cfg=pretrained_cfg(model))

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
