"""The result of accept.py to read.

What is predicted, what CUDA's allocator counted and what a CPU stood in for never share a name.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from accept_plan import METHODS, QUANTS
from accept_summary import error, errors

from s2a_cli.memory.margin import Margin

LISTED = 8  # names of a kind at most
Entry = dict[str, Any]


def markdown(result: Entry) -> str:
    races = [speed(result, race) for race in result["speed"]]
    parts = [heading(result), verdicts(result), kernels(result), memory(result), *races, host(result), left_out(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def counted(result: Entry) -> str:
    """What the figures of memory that are not predicted are."""
    return "measured" if result["cuda"] else "tracked on CPU tensors"


def heading(result: Entry) -> str:
    where, small = result["environment"], ", small form" if result["small"] else ""
    versions = (
        f"torch {where['torch']}, Triton {where['triton']}, timm {where['timm']}, peft {where['peft']}, Python"
        f" {where['python']}"
    )
    machine = f"{where['cpu']}, {where['cores']} cores"
    if result["cuda"]:
        title = f"# Acceptance on {where['device']}{small}"
        device = (
            f"{where['device']}, {where['total_mib']:,.0f} MiB, compute capability {where['capability']}, driver"
            f" {where['driver'] or 'not told'}, CUDA {where['cuda']}, cuDNN {where['cudnn']}; codes made by:"
            f" {where['kernels']}; {machine}; {versions}."
        )
        means = (
            "Measured: torch.cuda.max_memory_allocated and max_memory_reserved, in a process that has nothing else of"
            " its own. Deterministic algorithms are on, as in `s2a train`. Memory was measured by"
            f" {result['processes']} processes at once, speed by one alone on the device."
        )
    else:
        title = "# Acceptance, small form on a CPU: no figure here is of a CUDA device"
        device = f"{machine}; {versions}."
        means = (
            "**Nothing here was measured on CUDA.** In place of CUDA's counter stands s2a's own tracker of live CPU"
            " tensors, kernels ran in Triton's interpreter, and speeds are of a CPU: this page shows that the command"
            " runs, and no more."
        )
    lines = [title, device, means]
    lines.append(
        f"{result['date']}, commit {result['commit'] or 'not known'}, {result['used_seconds']:.0f} s of"
        f" {result['minutes'] * 60:.0f} s."
    )
    warnings = []
    if where["rivals"]:
        warnings.append(f"**The device was not idle: {where['rivals']}. Speeds are no figures.**")
    if where.get("hidden"):
        warnings.append(f"Not handed on to the processes that measure: {', '.join(where['hidden'])}.")
    if result["interrupted"]:
        warnings.append("**Broken off by hand.**")
    return "\n\n".join([*lines, *warnings, f"    {result['command']}"])


def percent(value: float) -> str:
    return f"{value:+.1%}".replace("%", " %")


def verdicts(result: Entry) -> str:
    """What the whole says, a line a question."""
    said, word = result["summary"], counted(result)
    lines = ["## In short", ""]
    over = {name: value for name, value in said["kernels"]["of_limit"].items() if not value <= 1}
    if said["kernels"]["of_limit"]:
        names = ", ".join(f"{name} ({value:.1f}x the limit)" for name, value in over.items()) or "none"
        where = "" if result["cuda"] else " (in Triton's interpreter)"
        lines.append(
            f"- Kernels{where}, {said['kernels']['calls']} calls beside their twins: beyond what rounding explains:"
            f" {names}."
        )
    else:
        lines.append("- Kernels: none was compared.")
    for what, key in (
        ("peak", "peak"),
        ("the same with what CUDA is thought to add, such as cuBLAS' workspace", "expected"),
        ("kept for the backward pass", "kept"),
        ("between steps", "static"),
        ("reserved, by the simulated allocator", "reserved"),
        ("the same with what CUDA is thought to add", "expected_reserved"),
        ("peak of a step that fits codes", "fitting"),
    ):
        if (found := said[key]) and (result["cuda"] or not key.startswith("expected")):
            lines.append(
                f"- Predicted against {word}, {what}: median error {found['median']:.1%}, with its sign"
                f" {percent(found['bias'])}; worst {percent(found['worst'])} ({found['name']}); {found['count']}"
                " combinations."
            )
    if not said["peak"]:
        lines.append(f"- Memory: no combination was both predicted and {word}.")
    fits = said["fits"]
    if fits["decisions"]:
        lines.append(
            f'- "Fits in N GiB", {fits["decisions"]} decisions, {fits["near"]} of them within 25 % of the size:'
            f" {len(fits['too_bold'])} too bold,"
            f" {len(fits['too_careful'])} too careful, {len(fits['unknown'])} not known."
        )
    if said["held_mib"] is not None:
        lines.append(
            f"- Held by cuBLAS after a row: {said['held_mib']:.1f} MiB (median); the device's context:"
            f" {result['context_mib']:,.0f} MiB."
        )
    if said["left"]:
        lines.append(
            "- **More than tables was left of the row before**, so these peaks are too high:"
            f" {', '.join(said['left'])}."
        )
    lines.append(f"- Dropped for want of time: {len(result['dropped'])}; failed: {len(failures(result))}; both below.")
    return "\n".join(lines)


def kernels(result: Entry) -> str:
    checks = [entry for entry in result["kernels"] if "of_limit" in entry]
    if not checks:
        return ""
    precisions = list(dict.fromkeys(entry["precision"] for entry in checks))
    head = [
        "operator",
        "calls",
        *(f"{kind}, {precision}" for precision in precisions for kind in ("largest difference", "of the limit")),
    ]
    lines = table_head(head)
    for name in sorted({name for entry in checks for name in entry["worst"]}):
        cells = [f"`{name}`", str(sum(entry["calls"].get(name, 0) for entry in checks))]
        for precision in precisions:
            mine = [entry for entry in checks if entry["precision"] == precision and name in entry["worst"]]
            for kind, digits in (("worst", ".2g"), ("of_limit", ".2f")):
                cells.append(f"{max(float(entry[kind][name]) for entry in mine):{digits}}" if mine else "")
        lines.append(row(cells))
    where = "on the device" if result["cuda"] else "in Triton's interpreter, on a CPU"
    said = [
        (
            f"Each call of {len(checks)} steps, {where}, on the arguments that the step gives it, beside plain PyTorch."
            " Differences: of codes the share of bytes, of others relative to the largest element; limits: 1 % of"
            " bytes, 1e-4 in fp32, 2^-5 in bf16."
        ),
    ]
    for kind, text in (
        ("left_to_plain", "Calls that kernels left to plain PyTorch"),
        ("without", "Operators of ours without a kernel, calls"),
    ):
        count: Counter[str] = sum((Counter(entry[kind]) for entry in checks), Counter())
        said.append(f"{text}: {', '.join(f'`{name}` {number}' for name, number in count.most_common()) or 'none'}.")
    return "\n".join(["## Kernels beside their twins", "", *said, "", *lines])


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table_head(cells: list[str]) -> list[str]:
    return [row(cells), "|---" * len(cells) + "|"]


def memory(result: Entry) -> str:
    entries = result["memory"]
    places = list(dict.fromkeys((entry["backbone"], entry["precision"]) for entry in entries))
    found = {(e["backbone"], e["precision"], e["method"], e["quant"]): e for e in entries}
    lines = table_head(["method, quant", *(f"{backbone} {precision}" for backbone, precision in places)])
    pairs = {(entry["method"], entry["quant"]) for entry in entries}
    for pair in sorted(pairs, key=lambda pair: (METHODS.index(pair[0]), QUANTS.index(pair[1]))):
        lines.append(row([", ".join(pair), *(cell(found.get((*place, *pair)), counted(result)) for place in places)]))
    batch = entries[0]["batch"] if entries else "?"
    said = [
        (
            f"Peak of a step of {batch} images, MiB, {counted(result)}; in brackets the error of the prediction,"
            f" (predicted / {counted(result)} - 1). `~`: predicted alone. refused: s2a does not take these settings."
            " Empty: neither."
        ),
    ]
    groups = [(", ".join(place), [e for e in entries if (e["backbone"], e["precision"]) == place]) for place in places]
    groups += [(f"quant={quant}", [e for e in entries if e["quant"] == quant]) for quant in QUANTS]
    by_group = [(name, found) for name, group in groups if (found := errors(group, "peak_mib", "peak_mib"))]
    if by_group:
        shown = [
            row([n, str(f["count"]), f"{f['median']:.1%}", percent(f["bias"]), f"{percent(f['worst'])}: {f['name']}"])
            for n, f in by_group
        ]
        said.append(
            "\n".join(
                [*table_head(["error of the predicted peak", "count", "median", "with its sign", "worst"]), *shown]
            )
        )
    fits = result["summary"]["fits"]
    if fits["decisions"]:
        context = f"{result['context_mib']:,.0f} MiB"
        assumed = "measured" if result["cuda"] and (result["host"] or result["speed"]) else "assumed"
        said.append(
            f"A combination is said to fit a device of N GiB where its predicted peak and the margin do ({Margin()})."
            f" It does where what was reserved and the context ({context}, {assumed}) do; it does not where not even"
            f" the peak that was {counted(result)} and the context do; in between it was tried out on an allocator of"
            " that size."
        )
        for text, kind in (
            ("Too bold (said to fit, and does not)", "too_bold"),
            ("Too careful (does fit)", "too_careful"),
            ("Not known", "unknown"),
        ):
            said.append(f"{text}: {'; '.join(fits[kind]) or 'none'}.")
    return "\n\n".join([f"## Memory: predicted and {counted(result)}", said[0], "\n".join(lines), *said[1:]])


def cell(entry: Entry | None, word: str) -> str:
    if entry is None:
        return ""
    peak, predicted = (((entry[kind] or {}).get("peak_mib")) for kind in ("measured", "predicted"))
    if peak:
        off = error(entry)
        return f"{peak:,.{1 if peak < 100 else 0}f}" + (f" ({percent(off)})" if off is not None else " (not predicted)")
    if entry["refused"]:
        return "refused"
    return f"~{predicted:,.0f}" if predicted else ""


def speed(result: Entry, race: Entry) -> str:
    rows, cuda = race["rows"], result["cuda"]
    whole = next((r for r in rows if r["name"] == "full"), {})
    full, most = whole.get("images_per_second"), whole.get("beside_mib")
    head = ["row", "images/s", "steps", "peak, predicted, MiB"] + (
        ["peak, measured beside the other rows, MiB"] if cuda else []
    )
    lines = table_head(head)
    for one in rows:
        rate, peak, own = (
            one.get("images_per_second"),
            (one.get("predicted") or {}).get("peak_mib"),
            one.get("beside_mib"),
        )
        cells = [
            f"{one['title']} (`{one['name']}`)",
            (f"{rate:,.1f}" + (f" ({rate / full:.2f}x)" if full else "")) if rate else "",
        ]
        cells += [str(len(one["seconds"])) if rate else "", f"~{peak:,.0f}" if isinstance(peak, float) else ""]
        cells += [(f"{own:,.0f}" + (f" ({most / own:.1f}x)" if most else "")) if own else ""] if cuda else []
        lines.append(row(cells))
    device = result["environment"]["device"] if cuda else "a CPU, not CUDA"
    said = (
        f"Medians of single steps of {race['batch']} images, in one process, between two steps of a row one of every"
        " other, in an order drawn anew each round. In brackets: how many times more images a second, or less memory,"
        " than full fine-tuning."
    )
    problem = [f"The race ended early: {race['problem']}."] if race.get("problem") else []
    return "\n\n".join(
        [f"## Speed: {race['backbone']}, {race['precision']}, on {device}", said, *problem, "\n".join(lines)]
    )


def host(result: Entry) -> str:
    entries = [entry for entry in result["host"] if entry.get("wall_ms")]
    if not entries:
        return ""
    head = ["backbone", "row", "wall, ms", "issued after, ms", "device busy, ms", "host's share"]
    head += ["kernels", "host waits", "operators", "of them ours", "energy, J"]
    lines = table_head(head)
    for e in entries:
        figures = [f"{e['wall_ms']:.1f}", f"{e['issued_ms']:.1f}"]
        figures += [
            f"{e['device_ms']:.1f}" if e["device_ms"] is not None else "",
            f"{e['host_share']:.0%}" if e["host_share"] is not None else "",
        ]
        figures += [
            f"{e[key]:,.0f}" if e[key] is not None else "" for key in ("kernels", "waits", "operators", "own_operators")
        ]
        figures.append(f"{e['joules']:.2f}" if e.get("joules") else "")
        lines.append(row([f"{e['backbone']} {e['precision']}", f"`{e['row']}`", *figures]))
    said = [
        f"One step of {entries[0]['batch']} images. Wall: with the device waited for at both ends; issued: when the"
        " host was done. Device busy: kernels and copies in PyTorch's trace, overlaps once. Host's share: of the wall"
        " time the part in which the device has nothing to do."
    ]
    said += [f"No device times: {problem}." for problem in dict.fromkeys(e["problem"] for e in entries if e["problem"])]
    where = "" if result["cuda"] else ", on a CPU, not CUDA"
    return "\n\n".join([f"## The host's share of a step{where}", *said, "\n".join(lines)])


def failures(result: Entry) -> list[str]:
    """What failed, with its reason."""
    said = [
        f"{e['name']}: {e['problem']}" for part in ("kernels", "compiled") for e in result[part] if e.get("problem")
    ]
    said += [f"{e['name']}: {e['problem']}" for e in result["host"] if not e.get("wall_ms")]
    for e in result["memory"]:
        if not e["refused"]:
            said += [f"{e['name']}, {part}: {reason}" for part, reason in e["problems"].items()]
    said += [f"{race['name']}: {race['problem']}" for race in result["speed"] if race.get("problem")]
    return said + [
        f"{race['name']} {one['name']}: {why}"
        for race in result["speed"]
        for one in race["rows"]
        for why in one["problems"].values()
    ]


def left_out(result: Entry) -> str:
    lines = ["## What is not here", ""]
    refused = Counter(tuple(e["problems"].values())[-1] for e in result["memory"] if e["refused"])
    for title, items in (
        ("Dropped for want of time", counted_by_kind(result["dropped"])),
        ("Failed", failures(result)),
        ("Refused by s2a", [f"{reason} ({count} combinations)" for reason, count in refused.items()]),
        ("Processes that did not start", result["not_started"]),
    ):
        lines += [f"{title}: {len(items)}", *(f"- {item}" for item in items), ""]
    return "\n".join(lines).rstrip()


def counted_by_kind(names: list[str]) -> list[str]:
    """The names, or of each kind with many of them their number: the result file has them all."""
    kinds = Counter(name.split()[0] for name in names)
    few = [name for name in names if kinds[name.split()[0]] <= LISTED]
    return few + [f"{kind}: {count}" for kind, count in kinds.items() if count > LISTED]
