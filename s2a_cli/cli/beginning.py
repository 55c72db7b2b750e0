"""`s2a init`: a first config for somebody's photos."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from s2a_cli.cli.deferred import imports
from s2a_cli.cli.options import check_keys, options_of
from s2a_cli.common.errors import UserError
from s2a_cli.common.files import atomic_write, is_there


def init(words: list[str]) -> int:
    """Writes a first config for a folder of photos."""
    force, words = "--force" in words, [word for word in words if word != "--force"]
    options, words = options_of(words, "out", "minutes")
    folders, words = [w for w in words if "=" not in w or is_there(Path(w))], [w for w in words if "=" in w]
    check_keys("init", words, ("out", "minutes"))
    if len(folders) != 1:
        raise UserError("s2a init FOLDER: expected one folder of photos, with a folder for each class")
    out, minutes = Path(options.get("out", "photos.yaml")), options.get("minutes", "20")
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", minutes) or not float(minutes):
        raise UserError(f"minutes={minutes}: expected a number above 0")
    if is_there(out) and not force:
        raise UserError(f"out={out}: is there already; choose another name, or add --force")
    if not out.parent.is_dir():
        raise UserError(f"out={out}: there is no folder {out.parent}")
    from s2a_cli.config.compose import compose
    from s2a_cli.config.overrides import value_text
    from s2a_cli.config.paths import check_paths

    check_paths(compose(["dataset=folder", f"dataset.root={value_text(folders[0])}", *words]))
    with imports():
        import s2a_cli.methods  # noqa: F401
        from s2a_cli.planner import starting

    begun = starting.start(folders[0].rstrip("/") or "/", words, float(minutes))
    try:
        atomic_write(out, begun.text(out))
    except OSError as error:
        raise UserError(f"out={out}: can't be written ({error.strerror})") from None
    print(*begun.found, f"\n{out}: change it as you like, then: s2a train {shlex.quote(f'config={out}')}", sep="\n")
    return 0
