"""The report as one HTML file: pictures inside it, no script, nothing fetched, light or dark as the reader likes.

Enters: a `Story`. Leaves: the text of the page. Every word that comes from data or a model passes through `escape`.
"""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

from mllm.evaluate.report.chart import loss_chart
from mllm.evaluate.report.document import document

if TYPE_CHECKING:
    from mllm.evaluate.exact import Answer, Score
    from mllm.evaluate.report.story import Story

ENLARGED = 3
"""Pixels a side that one small pixel becomes, so that viewers which ignore `image-rendering` show it sharp too."""


def render_page(story: Story) -> str:
    """The whole page, from doctype to footer."""
    return document(story.title, [_cards(story), _losses(story), _types(story), _wall(story), _seconds(story)])


def _cards(story: Story) -> str:
    cards = (
        f'<div class="card" style="--hue:{story.colours[name]}"><b>{result["accuracy"]:.1%}</b>'
        f"<span>{escape(name)}</span><small>{story.notes[name]}<br>{escape(story.meaning.get(name, ''))}</small></div>"
        for name, result in story.results.items()
    )
    return f'<div class="cards">{"".join(cards)}</div>'


def _losses(story: Story) -> str:
    if not story.curves:
        return ""
    return f"<h2>Loss <small>one stage after the other, logarithmic</small></h2>\n{loss_chart(story.curves)}"


def _types(story: Story) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in story.results)
    rows = (
        f"<tr><th>{escape(kind)}</th>"
        + "".join(_bar(result["by_type"].get(kind), story.colours[name]) for name, result in story.results.items())
        + "</tr>"
        for kind in story.types
    )
    table = f"<table><thead><tr><th>type</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h2>Accuracy by question type</h2>\n<div class="scroll">{table}</div>'


def _bar(score: Score | None, colour: str) -> str:
    if score is None:
        return "<td></td>"
    share, (low, high) = f"{score['accuracy']:.1%}", score["interval"]
    hint = f"{score['correct']} of {score['number']}; 95 % interval {low:.1%} to {high:.1%}"
    return f'<td title="{hint}"><div class="bar" style="--hue:{colour};--share:{share}"><i></i>{share}</div></td>'


def _wall(story: Story) -> str:
    if not story.gallery:
        return ""
    tiles = "\n".join(_tile(answer) for answer in story.gallery)
    return f'<h2>Held-out pictures <small>{story.gallery_note}</small></h2>\n<div class="wall">{tiles}</div>'


def _tile(answer: Answer) -> str:
    verdict, sign = ("right", "✓") if answer["correct"] else ("wrong", "✗")
    said = escape(answer["prediction"]) or "(nothing)"
    truth = "" if answer["correct"] else f"<small>it is {escape(answer['answer'])}</small>"
    return (
        f'<figure style="--verdict:var(--{verdict})" title="{escape(answer["id"])}">'
        f'<img alt="" src="{_data_uri(str(answer["image"]))}">'
        f"<figcaption>{escape(answer['question'])}<b>{sign} {said}</b>{truth}</figcaption></figure>"
    )


def _data_uri(path: str) -> str:
    """The picture as a PNG inside the page, small ones enlarged without smoothing."""
    from PIL import Image

    with Image.open(path) as original:
        image = original.convert("RGB")
    if max(image.size) <= 128:
        image = image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST)
    image.thumbnail((512, 512))
    memory = BytesIO()
    image.save(memory, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(memory.getvalue()).decode()


def _seconds(story: Story) -> str:
    rows = "".join(f"<tr><th>{escape(step)}</th><td>{took:,.1f} s</td></tr>" for step, took in story.seconds.items())
    return f'<h2>Time</h2>\n<table class="narrow"><tbody>{rows}</tbody></table>' if rows else ""
