"""Checks of settings against each other, where each alone keeps its rule."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from s2a_cli.common.text import nearest
from s2a_cli.config.rules import one_of, show
from s2a_cli.config.schema import DOMAINS, QuantConfig
from s2a_cli.config.settings import declared, members, rule_of


def check(config: DictConfig) -> dict[str, str]:
    """Returns the problems of the values in a config that fits the schema: {key: one line}.

    What needs the backbone or the data (a rank above the width, a missing folder) is checked where they are loaded.
    """
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for key, schema, name, value in declared(config):
        values[key], rule = value, rule_of(schema, name)
        if rule and value is not None and not rule.test(value):
            problems[key] = rule.problem(key, value, optional=type(None) in members(schema, name))

    def usable(*keys: str) -> bool:
        """Returns whether all these keys have a value without a problem."""
        return all(values.get(key) is not None and key not in problems for key in keys)

    batch, micro, epochs, warmup = (f"optim.{k}" for k in ("batch_size", "micro_batch", "epochs", "warmup_epochs"))
    if usable(micro, batch) and values[micro] > values[batch]:
        problems[micro] = f"{micro}={values[micro]}: expected at most {batch}={values[batch]}"
    if usable(warmup, epochs) and values[warmup] >= values[epochs]:
        problems[warmup] = f"{warmup}={values[warmup]}: expected less than {epochs}={values[epochs]}"
    problems |= _check_blocks(values.get("quant.blocks") or {})
    if usable("dataset.cache"):
        problems |= _check_cache(values)
    if values.get("backbone.weights") == "auto" and values.get("budget") is None:
        problems["backbone.weights"] = "backbone.weights=auto needs budget=SIZE, the memory that they are chosen for"
    if values.get("fidelity") not in (None, "exact") and values.get("budget") is None:
        problems["fidelity"] = f"fidelity={values['fidelity']} needs budget=SIZE, the memory that a plan is made for"
    if values.get("budget") is not None and values.get("compile"):
        problems["compile"] = "compile=true goes without budget=: the compiler decides what it keeps"
    if values.get("compile") and values.get("cuda_graphs"):
        problems["cuda_graphs"] = "cuda_graphs=true goes without compile=true: the compiler launches what it makes"
    if usable("compile_budget") and not values.get("compile"):
        problems["compile_budget"] = (
            f"compile_budget={values['compile_budget']} is the compiler's: set compile=true too"
        )
    if usable("quant.input") and values.get("quant.recompute") == "none":
        problems["quant.input"] = (
            f"quant.input={values['quant.input']} is of recomputed blocks: set quant.recompute=block too"
        )
    if (
        values.get("compile")
        and not any(key.startswith("quant.") for key in problems)
        and not cast(QuantConfig, OmegaConf.to_object(config.quant)).is_reference
    ):
        problems["compile"] = (
            f"compile=true needs quant=none, not {values['quant.name']}: codes and recomputation break the compiler's"
            " graph at every operator (ViT-Ti with int4: 60 graphs, and on two CPU cores 1.13 times the time of a step"
            " without it)"
        )
    if values.get("compile") and values.get("backbone.weights") == "offload":
        problems["compile"] = (
            "compile=true can't be with backbone.weights=offload: weights come and go between operators"
        )
    if usable("dataset.shots", "dataset.fraction"):
        problems["dataset.fraction"] = "dataset.shots and dataset.fraction exclude each other: set one to null"
    domains = values.get("dataset.domain"), values.get("dataset.test_domain")
    problems |= domain_problems(values.get("dataset.name"), *domains)
    if domains[1] and not domains[0] and values.get("dataset.name") != "folder":
        problems["dataset.test_domain"] = "dataset.test_domain is set without dataset.domain, the domain to train on"
    return problems


def domain_problems(dataset: str | None, domain: str | None, test_domain: str | None) -> dict[str, str]:
    """Returns the problems of the domains of DomainNet; those of a folder are checked where it is read."""
    if dataset != "domainnet":
        return {}
    given, rule = {"dataset.domain": domain, "dataset.test_domain": test_domain}, one_of(*DOMAINS)
    odd = {key: value for key, value in given.items() if value is not None and not rule.test(value)}
    return {key: rule.problem(key, value, optional=True) for key, value in odd.items()}


def check_quant(quant: QuantConfig) -> list[str]:
    """Returns the problems of a QuantConfig that was made in Python, one line each."""
    settings = {f.name: getattr(quant, f.name) for f in fields(quant) if f.name != "blocks"}
    found = [_quant_problem(name, name, value) for name, value in settings.items() if name != "name"]
    found += list(_check_blocks(quant.blocks).values())
    if quant.input is not None and quant.recompute == "none":
        found.append(f"input={quant.input} is of recomputed blocks: set recompute='block' too")
    return [problem for problem in found if problem]


def _quant_problem(key: str, name: str, value: Any) -> str:
    """Returns what is wrong with a value of QuantConfig; empty where nothing is."""
    rule, kinds = rule_of(QuantConfig, name), members(QuantConfig, name)
    number = float in kinds and type(value) is int
    if (type(value) in kinds or number) and not (rule and value is not None and not rule.test(value)):
        return ""
    accepted = rule.accepted if rule else "true or false"
    return f"{key}={show(value)}: expected {accepted}" + (", or null" if type(None) in kinds else "")


def _check_cache(values: dict[str, Any]) -> dict[str, str]:
    """Returns the problems of dataset.cache.

    Whether the method has a part that trains alone is checked where it is attached.
    """
    key = "dataset.cache"
    for other, value, why in (
        ("dataset.scale", None, "each random crop would need another forward pass of the backbone"),
        ("optim.mixup", 0.0, "each mixed image would need another forward pass of the backbone"),
        ("optim.cutmix", 0.0, "each mixed image would need another forward pass of the backbone"),
        ("compile", False, "the part that is trained is too small to compile"),
    ):
        if values.get(other) != value:
            return {key: f"{key}={values[key]} needs {other}={show(value)}: {why}"}
    if values[key] == "auto" and values.get("budget") is None:
        return {key: f"{key}=auto needs budget=SIZE, the memory that a plan is made for"}
    return {}


def _check_blocks(blocks: dict[int, Any]) -> dict[str, str]:
    """Returns the problems of quant.blocks; whether the backbone has as many blocks is checked where it is made."""
    own = [f.name for f in fields(QuantConfig) if f.name not in ("name", "calibrate", "rounding", "blocks")]
    for block, settings in blocks.items():
        if not isinstance(settings, dict) or isinstance(block, bool):
            return {
                "quant.blocks": (
                    f"quant.blocks={show(blocks)}: expected settings for each number, such as {{3: {{norm: 8}}}}"
                )
            }
        for name, value in settings.items():
            key = f"quant.blocks.{block}.{name}"
            if name not in own:
                return {key: f"{key}: expected one of {', '.join(own)}{nearest(str(name), own)}"}
            if problem := _quant_problem(key, name, value):
                return {key: problem}
    return {}
