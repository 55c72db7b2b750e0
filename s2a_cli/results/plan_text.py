"""Writes the plan of a run as text."""

from __future__ import annotations

import shlex

from tabulate import tabulate

from s2a_cli.results.record import Choice, Plan

HEAD = ("plan", "needs, MiB", "seconds a step, predicted", "timed", "why")


def render(plan: Plan) -> str:
    """Returns what was chosen and its alternatives as a table, and the words that ask for the same without a budget."""
    table = tabulate(
        lines(plan["choices"]), HEAD, disable_numparse=True, colalign=("left", "right", "right", "right", "left")
    )
    chosen = plan["choices"][0]
    return "\n".join(
        [
            f"planned in {plan['seconds']:.0f} s for {plan['available_mib']:,.0f} MiB on {plan['device']}:"
            f" {chosen['about']}",
            "",
            table,
            "",
            f"the same without planning: {shlex.join(chosen['words'])}",
        ]
    )


def lines(choices: list[Choice]) -> list[list[str]]:
    """Returns a line of texts for each choice of a plan, in the order of HEAD."""
    return [_line(choice) for choice in choices]


def _line(choice: Choice) -> list[str]:
    predicted, timed = (_seconds(choice[key]) for key in ("predicted_seconds", "measured_seconds"))
    cosine = choice["fidelity"]
    why = choice["why"] + (f"; cosine {cosine:.4f}" if cosine is not None and "cosine" not in choice["why"] else "")
    needed = "–" if choice["needed_mib"] is None else f"{choice['needed_mib']:,.1f}"
    return [choice["about"], needed, predicted, timed, why]


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.3g}"
