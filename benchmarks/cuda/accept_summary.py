"""What the entries of an acceptance say: errors of predictions, and decisions that were wrong."""

from __future__ import annotations

import statistics
from typing import Any

from accept_plan import SIZES_GIB

from s2a_cli.memory.margin import Margin
from s2a_cli.memory.result import MIB

Entry = dict[str, Any]
LEFT_MIB = 16.0  # of a row before: more than tables that are made once
NEAR = 0.25  # of a size: decisions that could be wrong


def errors(entries: list[Entry], predicted: str, measured: str) -> Entry | None:
    """The error of one predicted figure against a measured one, (predicted / measured - 1), over the entries that have
    both.

    median: of the absolute errors; worst: the largest, with its sign and `name`; bias: the median with its sign.
    """
    found = [(value, entry["name"]) for entry in entries if (value := error(entry, predicted, measured)) is not None]
    if not found:
        return None
    worst = max(found, key=lambda item: abs(item[0]))
    values = [value for value, _ in found]
    return {
        "count": len(found),
        "median": statistics.median(map(abs, values)),
        "bias": statistics.median(values),
        "worst": worst[0],
        "name": worst[1],
    }


def error(entry: Entry, predicted: str = "peak_mib", measured: str = "peak_mib") -> float | None:
    above, below = (entry.get("predicted") or {}).get(predicted), (entry.get("measured") or {}).get(measured)
    return above / below - 1 if above and below else None


def held(entries: list[Entry]) -> float | None:
    """MiB that cuBLAS' workspaces have held after a row, in the median."""
    found = [value for entry in entries if (value := (entry.get("measured") or {}).get("held_mib")) is not None]
    return statistics.median(found) if found else None


def decisions(entries: list[Entry], context_mib: float) -> list[Entry]:
    """Of each combination and size: what the product says, and what is so: True, False, or None where that is not
    known.

    A run fits where all that its allocator has taken and the context do; it does not where not even what was allocated
    at the peak does. In between lies what the allocator could give back: there `capped` {GiB: fits} says whether the
    run went on.
    """
    found = []
    for entry in entries:
        if error(entry) is None:
            continue
        peak, taken = (
            entry["measured"]["peak_mib"],
            entry["measured"].get("reserved_mib") or entry["measured"]["peak_mib"],
        )
        needed = Margin().around(_taken(entry["predicted"]) * MIB) / MIB
        for gib in SIZES_GIB:
            size = gib * 1024
            so = (
                True
                if taken + context_mib <= size
                else False
                if peak + context_mib > size
                else (entry.get("capped") or {}).get(str(gib))
            )
            near = abs(needed / size - 1) <= NEAR
            found.append({"name": entry["name"], "gib": gib, "said": needed <= size, "so": so, "near": near})
    return found


def _taken(predicted: Entry) -> float:
    """The MiB that the allocator is predicted to take; of rows whose steps are not simulated, the peak."""
    return predicted.get("reserved_mib") or predicted["peak_mib"]


def judged(found: list[Entry]) -> Entry:
    """Counts of decisions, and which were wrong. The dangerous ones: it was said to fit."""
    return {
        "decisions": len(found),
        "near": sum(one["near"] for one in found),
        "unknown": [f"{one['name']} in {one['gib']} GiB" for one in found if one["so"] is None],
        "too_bold": [f"{one['name']} in {one['gib']} GiB" for one in found if one["so"] is False and one["said"]],
        "too_careful": [f"{one['name']} in {one['gib']} GiB" for one in found if one["so"] is True and not one["said"]],
    }


def summary(result: Entry) -> Entry:
    """The verdicts of a result, as they stand at the head of its page."""
    entries, checks = result["memory"], [entry for entry in result["kernels"] if "of_limit" in entry]
    operators = sorted({name for entry in checks for name in entry["of_limit"]})
    worst = {name: max(entry["of_limit"].get(name, 0.0) for entry in checks) for name in operators}
    return {
        "kernels": {"steps": len(checks), "calls": sum(sum(e["calls"].values()) for e in checks), "of_limit": worst},
        "peak": errors(entries, "peak_mib", "peak_mib"),
        "expected": errors(entries, "expected_mib", "peak_mib"),
        "kept": errors(entries, "kept_mib", "kept_mib"),
        "static": errors(entries, "static_mib", "static_mib"),
        "reserved": errors(entries, "reserved_mib", "reserved_mib"),
        "expected_reserved": errors(entries, "expected_reserved_mib", "reserved_mib"),
        "fitting": errors(entries, "peak_mib", "fitting_peak_mib"),
        "held_mib": held(entries),
        "left": [entry["name"] for entry in entries if ((entry.get("measured") or {}).get("left_mib") or 0) > LEFT_MIB],
        "fits": judged(decisions(entries, result["context_mib"])),
    }
