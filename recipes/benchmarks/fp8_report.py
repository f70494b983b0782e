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
RUNS = {
    "plain": "float32",
    "bf16": "bfloat16",
    "all": "float32, all in 8-bit floats",
    "gate": "float32, what the gate takes in 8-bit floats",
}


def cosine_table(found: dict[str, Any]) -> Table:
    """A line for each way, three columns for each model."""
    models = found["models"]
    heads = [head for name in models for head in (f"{name}: share", "cosine (least)", "loss")]
    table = Table("in 8-bit floats", *heads, title=f"cosine of the connector's gradient: {described(models)}")
    for words in dict.fromkeys(words for model in models.values() for words in model["ways"]):
        table.add_row(words, *(cell for model in models.values() for cell in cells(words, model)))
    return table


def described(models: dict[str, Any]) -> str:
    return "; ".join(f"{name}, {SIZES[name]}, {model['blocks']} blocks" for name, model in models.items())


def cells(words: str, model: dict[str, Any]) -> list[str]:
    """Share and cosines of one way; what the gate takes is marked."""
    if words not in model["ways"]:
        return ["", "", ""]
    way, mark = model["ways"][words], " taken" if words == model["chosen"] else ""
    return [f"{way['share']:.0%}", f"{way['cosine']:.4f} ({way['least']:.4f}){mark}", f"{way['loss']:+.2%}"]


def curve_table(found: dict[str, Any]) -> Table:
    """The other runs beside the plain one."""
    curve = found["curve"]
    table = Table(
        f"align run of {curve['steps']} steps",
        "share",
        "first loss",
        "last loss",
        f"means of {curve['window']} losses differ at worst",
        "on average",
        "asked for",
    )
    for name, words in RUNS.items():
        share = f"{curve['taken'][name]['share']:.0%}" if name in curve["taken"] else ""
        ends = [f"{curve['losses'][name][place]:.4f}" for place in (0, -1)]
        table.add_row(words, share, *ends, *apart(curve, name))
    return table


def apart(curve: dict[str, Any], name: str) -> list[str]:
    """How far one run lies from the plain one, and whether that was asked for."""
    if name not in curve["difference"]:
        return ["", "", ""]
    far = curve["difference"][name]
    first, last = far["at"], min(far["at"] + curve["window"] - 1, curve["steps"])
    kept = f"at most {curve['asked']:.1%} {'met' if far['worst'] <= curve['asked'] else 'missed'}"
    asked = kept if name in curve["taken"] else ""
    return [f"{far['worst']:.2%} (steps {first} - {last})", f"{far['mean']:+.2%}", asked]
