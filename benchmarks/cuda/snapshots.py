"""Records what PyTorch's allocator does in small training steps, for the simulated allocator to be held against.

    python benchmarks/cuda/snapshots.py [OUT]      # on a CUDA device, 1 minute; default: benchmarks/cuda/snapshots

Some rows of ../tiers/rows.py, each in a process of its own, with and without expandable segments: ViT-Ti at 112 px with
random weights, 16 images, three steps. OUT/ROW[-expandable].pickle.gz is PyTorch's own snapshot
(torch.cuda.memory._dump_snapshot), without stack traces; OUT/snapshots.json has what the counters said.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "tiers"), str(Path(__file__).parents[2])]

SNAPPED = ("full", "bias", "T3")
WORDS = ["backbone=vit_t", "backbone.pretrained=false", "backbone.image_size=112", "precision=fp32"]
IMAGES, STEPS = 16, 3


def snap(row: str, path: Path) -> dict[str, float | str]:
    """Runs a row's steps under the recorder; writes the snapshot and returns the counters, in MiB."""
    import torch
    from rows import BY_NAME, Made, noise

    from s2a_cli.memory.result import MIB
    from s2a_cli.training.run import choose_device

    device = choose_device("cuda")
    torch.cuda.memory._record_memory_history("all", context=None, stacks="python")
    made = Made(BY_NAME[row], WORDS, device)
    optimizer, (images, targets) = made.optimizer(), noise(made.backbone.image.size, IMAGES)
    for _ in range(STEPS):
        made(made.model, optimizer, images.to(device), targets.to(device))
    torch.cuda.synchronize()
    raw = path.with_suffix("")
    torch.cuda.memory._dump_snapshot(str(raw))
    path.write_bytes(gzip.compress(raw.read_bytes(), 9))
    raw.unlink()
    return {
        "row": row,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "peak_mib": torch.cuda.max_memory_allocated() / MIB,
        "reserved_mib": torch.cuda.max_memory_reserved() / MIB,
    }


def main(argv: list[str]) -> int:
    if argv[:1] == ["--one"]:
        print(json.dumps(snap(argv[1], Path(argv[2]))))
        return 0
    out = Path(argv[0]) if argv else Path(__file__).parent / "snapshots"
    out.mkdir(parents=True, exist_ok=True)
    started = {}
    for row in SNAPPED:
        for suffix, setting in (("", "False"), ("-expandable", "True")):
            name = f"{row}{suffix}"
            command = [sys.executable, __file__, "--one", row, str(out / f"{name}.pickle.gz")]
            environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{setting}"}
            started[name] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    found = {}
    for name, process in started.items():
        said, _ = process.communicate(timeout=120)
        if process.returncode:
            print(f"{name}: failed", file=sys.stderr)
        else:
            found[name] = json.loads(said.splitlines()[-1])
    (out / "snapshots.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if len(found) == len(started) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
