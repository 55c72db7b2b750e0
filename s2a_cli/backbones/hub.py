"""Asks the hub of pretrained weights once whether it answers; its own client would try again for more than a minute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from huggingface_hub import constants, get_session
from huggingface_hub.file_download import repo_folder_name

from s2a_cli.common.errors import UserError

PATIENCE = 3.0  # seconds


class WeightsMissing(UserError):
    """Means that pretrained weights are neither in the hub's cache nor to be had from it."""


@contextmanager
def hub() -> Iterator[str]:
    """Yields why the hub can't be reached; empty where it answers. Within, its client then reads its cache alone."""
    why = _unreachable()
    with cache_alone() if why else nullcontext():
        yield why


@contextmanager
def cache_alone() -> Iterator[None]:
    """Has the hub's client read its cache alone within."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True  # which it reads at every request
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_known(repository: str) -> bool:
    """Tells whether a cache may hold something of a model repository, `owner/name` or `owner/name@revision`."""
    if os.environ.get("TIMM_USE_OLD_CACHE"):  # timm then looks into a cache of its own first
        return True
    folder = repo_folder_name(repo_id=repository.partition("@")[0], repo_type="model")
    return (Path(constants.HF_HUB_CACHE) / folder).is_dir()


def _unreachable() -> str:
    """Returns why the hub can't be reached, in words; empty where it answers."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # of the client, which differs by version: no name, no route, no answer in time
        return f"{constants.ENDPOINT} can't be reached: {type(error).__name__}"
    return ""
