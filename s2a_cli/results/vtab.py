"""The groups of data sets over which tables take means."""

from __future__ import annotations

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import nearest

VTAB = {
    "natural": ("cifar100", "caltech101", "dtd", "flowers102", "pets", "svhn", "sun397"),
    "specialized": ("camelyon", "eurosat", "resisc45", "retinopathy"),
    "structured": (
        *("clevr_count", "clevr_dist", "dmlab", "kitti"),
        *("dsprites_loc", "dsprites_ori", "norb_azi", "norb_ele"),
    ),
}


GROUPS = {  # groups=NAME
    "vtab": {name: tuple(f"vtab_{task}" for task in tasks) for name, tasks in VTAB.items()},
    "domainnet": {
        "photos": ("domainnet-real",),
        "drawn": tuple(f"domainnet-{d}" for d in ("clipart", "infograph", "painting", "quickdraw", "sketch")),
    },
}


def parse_groups(text: str) -> dict[str, tuple[str, ...]]:
    """Returns {group: its data sets} of `vtab`, `domainnet`, or `natural:pets,flowers102/other:dtd`.

    Raises UserError for another text.
    """
    if text in GROUPS:
        return GROUPS[text]
    parts = [part.partition(":") for part in text.split("/")]
    if not all(name and members.strip(",") for name, _, members in parts):
        raise UserError(
            f"groups={text}: expected {', '.join(GROUPS)} or NAME:DATASET,DATASET/NAME:DATASET{nearest(text, GROUPS)}"
        )
    return {name: tuple(filter(None, members.split(","))) for name, _, members in parts}
