"""What the interception of an operator costs the host, apart from the work on its elements.

    python benchmarks/operators/host_overhead.py

Times operators on tiny tensors, in CPU seconds of the thread: stock, with 4-bit codes, and with 4-bit codes whose
encoding and decoding give back what they gave the first time, which leaves the interception. Best of several rounds.
Writes results/host_overhead.json and .md. A GPU's launches come on top; benchmarks/cuda measures those.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations import compress_activations
from s2a_cli.activations.ops import norm, pointwise
from s2a_cli.activations.quant import groupwise
from s2a_cli.common.files import atomic_write
from s2a_cli.config.schema import QuantConfig
from s2a_cli.training.environment import environment

ROUNDS, PASSES, CALLS = 7, 100, 20
FITTED = 40  # passes after which no layer is looked at any more
OUT = Path(__file__).parent
CODES = [
    (pointwise, "quantize_elementwise"),
    (pointwise, "multiply_dequantized"),
    (norm, "quantize_normalized"),
    (norm, "norm_backward"),
]
CODES += [(groupwise, "quantize_groupwise"), (groupwise, "dequantize_groupwise")]

x = torch.randn(1, 2, 16, requires_grad=True)
weight = torch.ones(16, requires_grad=True)
heads = torch.randn(1, 2, 2, 16, requires_grad=True)
OPERATORS: dict[str, Callable[[], Tensor]] = {
    "x + 1, not coded": lambda: x + 1,
    "gelu": lambda: F.gelu(x),
    "layer_norm": lambda: F.layer_norm(x, (16,), weight),
    "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(heads, heads, heads),
}


@contextmanager
def no_work():
    """Within it, codes are made and read once."""

    def once(function: Callable) -> Callable:
        known: dict[torch.Size, Any] = {}

        def found(first: Tensor, *rest: Any) -> Any:
            if (result := known.get(first.shape)) is None:
                result = known[first.shape] = function(first, *rest)
            return result

        return found

    with ExitStack() as stack:
        for module, name in CODES:
            stack.enter_context(mock.patch.object(module, name, once(getattr(module, name))))
        yield


def timed(function: Callable[[], Tensor], context: Any) -> tuple[float, float]:
    """Microseconds of a forward and of a backward call, the sum of the output included."""
    best = [float("inf")] * 2
    for _ in range(ROUNDS):
        outputs, start = [], time.thread_time()
        for _ in range(PASSES):
            with context:
                outputs += [function() for _ in range(CALLS)]
        middle = time.thread_time()
        for y in outputs:
            y.sum().backward()
        taken = middle - start, time.thread_time() - middle
        best = [min(known, seconds / len(outputs) * 1e6) for known, seconds in zip(best, taken)]
    return best[0], best[1]


def main() -> int:
    torch.set_num_threads(1)
    rows = []
    for name, function in OPERATORS.items():
        memory = compress_activations(QuantConfig(name="int4", pointwise=4, norm=4, attention=4))
        for _ in range(FITTED):
            with memory:
                for _ in range(CALLS):
                    function()
        row = {"operator": name, "stock": timed(function, nullcontext()), "int4": timed(function, memory)}
        with no_work():
            row["interception"] = timed(function, memory)
        rows.append(row)
    lines = [
        "| operator | stock | 4-bit codes on a CPU | 4-bit codes, without their work |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        "| "
        + " | ".join(
            [r["operator"], *(" + ".join(f"{t:.0f}" for t in r[k]) for k in ("stock", "int4", "interception"))]
        )
        + " |"
        for r in rows
    ]
    said = (
        "`python benchmarks/operators/host_overhead.py`. Microseconds of the host, forward + backward (with a sum), on"
        f" tiny tensors; best of {ROUNDS}."
    )
    page = "\n".join(["# What an intercepted operator costs the host", "", said, "", *lines, ""])
    atomic_write(
        OUT / "host_overhead.json", json.dumps({"environment": environment("cpu"), "rows": rows}, indent=1) + "\n"
    )
    atomic_write(OUT / "host_overhead.md", page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
