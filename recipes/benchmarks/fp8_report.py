"""The numbers of `fp8` as tables.

Enters: what was found. Leaves: the cosine by what is multiplied in 8-bit floats, model by model, and how far the loss
of a run with them lies from that of one without.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

SIZES = {
    "1.5B": "Qwen2.5-1.5B's depth, an eighth as wide, weights at random",
    "7B": "Qwen2.5-7B's depth, a sixteenth as wide, weights at random",
    "tiny": "the tiny recipe's LLM, trained",
    "deep": "the same, trained with more blocks",
}
RUNS = {"all": "all", "gate": "what the gate took"}


def cosine_table(found: dict[str, Any]) -> Table:
    """A line for each way, two columns for each model."""
    models = found["models"]
    heads = [head for name in models for head in (f"{name}: share", "cosine (least)")]
    table = Table("in 8-bit floats", *heads, title=f"cosine of the connector's gradient: {described(models)}")
    for words in dict.fromkeys(words for model in models.values() for words in model["ways"]):
        table.add_row(words, *(cell for model in models.values() for cell in cells(words, model)))
    return table


def described(models: dict[str, Any]) -> str:
    return "; ".join(f"{name}, {SIZES[name]}, {model['blocks']} blocks" for name, model in models.items())


def cells(words: str, model: dict[str, Any]) -> list[str]:
    """Share and cosines of one way; what the gate takes is marked."""
    if words not in model["ways"]:
        return ["", ""]
    way, mark = model["ways"][words], " taken" if words == model["chosen"] else ""
    return [f"{way['share']:.0%}", f"{way['cosine']:.4f} ({way['least']:.4f}){mark}"]


def curve_table(found: dict[str, Any]) -> Table:
    """The runs with 8-bit products beside the plain one."""
    curve = found["curve"]
    steps, window, plain = curve["steps"], curve["window"], curve["losses"]["plain"]
    table = Table(
        "8-bit products of an align run",
        "share",
        "cosine of its first row",
        "first loss (plain)",
        "last loss (plain)",
        f"means of {window} of {steps} steps differ at most",
        "asked for",
    )
    for name, words in RUNS.items():
        taken, losses, far = curve["taken"][name], curve["losses"][name], curve["difference"][name]
        cosine = f"{taken['cosine']:.4f}" if taken["cosine"] else "not asked"
        pairs = [f"{losses[place]:.4f} ({plain[place]:.4f})" for place in (0, -1)]
        verdict = f"at most {curve['asked']:.1%} {'met' if far <= curve['asked'] else 'missed'}"
        table.add_row(words, f"{taken['share']:.0%}", cosine, *pairs, f"{far:.2%}", verdict)
    return table
