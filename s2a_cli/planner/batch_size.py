"""Finds the largest batch that fits a device."""

from __future__ import annotations

import re

import torch
from omegaconf import DictConfig

from s2a_cli.common import distributed
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.memory.margin import Margin
from s2a_cli.memory.result import MIB
from s2a_cli.planner.run_memory import Composition, Predictor, with_batch_size
from s2a_cli.planner.search import largest
from s2a_cli.planner.sizes import AUTO, size


def device_size(text: str) -> int:
    """Returns the bytes of `fit=`: a size, or a CUDA device of this machine.

    Raises UserError for a device that is not there.
    """
    if not re.fullmatch(r"cuda(:\d+)?", text):
        return size("fit", text)
    count = torch.cuda.device_count()
    number = int(text.partition(":")[2] or 0)
    if number >= count:
        there = "this machine has no CUDA device" if not count else f"there are cuda:0 to cuda:{count - 1}"
        raise UserError(f"fit={text}: {there}; give a size, such as fit=8GiB")
    return torch.cuda.get_device_properties(number).total_memory


def largest_batch(
    config: DictConfig, device_bytes: int, margin: Margin = Margin(), predictor: Predictor | None = None
) -> int:
    """Returns the most images an optimiser step with which a run is predicted to fit; 0 where not even the fewest do.

    These are at most as many as there are images to train on. Raises UserError for a composition that can't be
    predicted.
    """
    predictor = predictor or Predictor()

    def needed(batch: int) -> float:
        """Returns the bytes of the device that a batch of this size needs."""
        return margin.needed(predictor(Composition.of(with_batch_size(config, batch))))

    composition = Composition.of(config)
    return largest(needed, device_bytes, composition.images, least=predictor.fewest(composition))


def need_device() -> None:
    """Raises UserError where there is no CUDA device that a batch could fit."""
    if not torch.cuda.device_count():
        raise UserError(
            f"{AUTO}: there is no CUDA device to fit; `s2a memory fit=8GiB` tells a batch for one elsewhere"
        )


def resolved(words: list[str]) -> list[str]:
    """Returns the words of `s2a train` with optim.batch_size=auto replaced by the largest batch that fits.

    It fits the CUDA device of the run, with busy=allow what others leave free of it now. Raises UserError where there
    is no CUDA device, and where nothing fits.
    """
    if AUTO not in words:
        return words
    need_device()
    rest = [word for word in words if word != AUTO]
    config = compose([word for word in rest if not word.startswith("--")])
    device = torch.device("cuda" if config.device == "auto" else config.device)
    if device.type != "cuda":
        raise UserError(f"{AUTO} fits the memory of a CUDA device, not device={config.device}; set a number")
    processes, there = distributed.world(), torch.cuda.get_device_properties(device).total_memory
    left = f"{there / MIB:,.0f} MiB of {device}"
    if config.busy == "allow" and processes == 1 and (free := torch.cuda.mem_get_info(device)[0]) < there:
        there, left = free, f"{free / MIB:,.0f} MiB that are free on {device}"
    found = largest_batch(config, there, predictor=Predictor(processes))
    if not found:
        raise UserError(f"optim.batch_size=auto: not one image fits the {left}; see s2a memory fit=")
    print(f"optim.batch_size={found}: the largest that is predicted to fit the {left}")
    return [*rest, f"optim.batch_size={found}"]
