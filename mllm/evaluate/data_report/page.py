"""The data set as one HTML file: charts inside it, no script, nothing fetched, light or dark as the reader likes.

Enters: the numbers of `mllm.data.curation.statistics`, and examples. Leaves: the page. Every word that comes from
data passes through `escape`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from io import BytesIO
from typing import Any

from mllm.data.images import open_image
from mllm.data.index import Index
from mllm.evaluate.data_report import charts
from mllm.evaluate.data_report.words import Numbers, colours, headlines, per_sample
from mllm.evaluate.report.document import document
from mllm.evaluate.report.story import COLOURS, STAGE_COLOURS

THUMBNAIL = 320
"""Pixels of the longer side."""
MORE = """.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(23rem, 1fr)); gap: 1rem 2rem; }
.charts h2 { margin: 2rem 0 .4rem; }
svg .mark { stroke: var(--faint); stroke-dasharray: 2 3; }
svg .cut { fill: #c2557a; opacity: .25; }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem; margin-right: .4rem;
  background: var(--hue); }
.scroll table { table-layout: auto; }
.scroll .bar { min-width: 7rem; }
.number { text-align: right; }
.wall figure { border-bottom-width: 1px; }
.wall { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); align-items: start; }
.wall figure img { aspect-ratio: 4/3; object-fit: cover; image-rendering: auto; }
.wall p { margin: .3rem 0 0; white-space: pre-line; max-height: 14rem; overflow: auto; }
"""


def render_page(title: str, numbers: Numbers, examples: Mapping[str, list[dict[str, Any]]]) -> str:
    """The whole page, from doctype to footer."""
    panels = (panel(numbers) for panel in (_lengths, _learned, _fill, _sizes, _images))
    drawn = "".join(f"<div>{panel}</div>" for panel in panels if panel)
    walls = (_wall(name, shown, numbers["unit"]) for name, shown in examples.items() if shown)
    parts = [_cards(numbers), f'<div class="charts">{drawn}</div>', _sources(numbers), _faults(numbers), *walls]
    return document(title, parts, style=MORE)


def _cards(numbers: Numbers) -> str:
    hues = ("#737b8a", COLOURS[1], COLOURS[0], STAGE_COLOURS[0], COLOURS[2])
    cards = (
        f'<div class="card" style="--hue:{hue}"><b>{number}</b><span>{name}</span><small>{escape(note)}</small></div>'
        for (number, name, note), hue in zip(headlines(numbers), hues, strict=False)
    )
    return f'<div class="cards">{"".join(cards)}</div>'


def _lengths(numbers: Numbers) -> str:
    told, unit = numbers["lengths"], numbers["unit"]
    names = [line["name"] for line in numbers["sources"]]
    stacks = list(zip(names, colours(len(names)), told["counts"], strict=True))
    marks = [
        (told["quantiles"][key], f"{name} {told['quantiles'][key]:,}")
        for key, name in (("50", "median"), ("99", "99 %"))
    ]
    note = "samples a doubling" if told["is_log"] else "samples"
    chart = charts.stacked(told["edges"], stacks, told["is_log"], unit, marks)
    return f"<h2>Length in {unit} <small>{note}</small></h2>{chart}"


def _learned(numbers: Numbers) -> str:
    shares = [(f"{10 * at}–{10 * at + 10}", count) for at, count in enumerate(numbers["supervised_shares"])]
    chart = charts.columns(shares, STAGE_COLOURS[0], "share that is learned")
    return f"<h2>Share that is learned <small>samples, by percent of their {numbers['unit']}</small></h2>{chart}"


def _fill(numbers: Numbers) -> str:
    told = numbers["fill"]
    if not told:
        return ""
    marks = [(told["best"], f"best {told['best']:,}")]
    if told["chosen"] and told["chosen"] != told["best"]:
        marks.append((told["chosen"], f"chosen {told['chosen']:,}"))
    chart = charts.curve(told["seq_length"], told["fill"], told["cut"], COLOURS[2], marks)
    return f"<h2>Fill of rows <small>real tokens by seq_length; the area: samples that are cut</small></h2>{chart}"


def _sizes(numbers: Numbers) -> str:
    told = numbers["image_sizes"]
    if not told["edges"]:
        return ""
    most = ", ".join(f"{width} x {height} ({count:,})" for width, height, count in told["commonest"][:3])
    chart = charts.heat(told["edges"], told["counts"], COLOURS[1])
    return f"<h2>Image sizes <small>width and height; most often {most}</small></h2>{chart}"


def _images(numbers: Numbers) -> str:
    chart = charts.columns(per_sample(numbers), COLOURS[1], "images in a sample")
    return f"<h2>Images in a sample <small>samples</small></h2>{chart}"


def _sources(numbers: Numbers) -> str:
    heads = (
        "source",
        "share of samples",
        f"share of {numbers['unit']}",
        "learned",
        "samples",
        "images",
        numbers["unit"],
    )
    rows = (
        f'<tr><th><i class="key" style="--hue:{hue}"></i>{escape(line["name"])}</th>'
        + "".join(_bar(line[key], hue) for key in ("share_of_samples", "share_of_length", "supervised_share"))
        + "".join(f'<td class="number">{line[key]:,}</td>' for key in ("samples", "images", "length"))
        + "</tr>"
        for line, hue in zip(numbers["sources"], colours(len(numbers["sources"])), strict=True)
    )
    head = "".join(f"<th>{head}</th>" for head in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h2>Sources</h2>\n<div class="scroll">{table}</div>'


def _bar(share: float, colour: str) -> str:
    return f'<td><div class="bar" style="--hue:{colour};--share:{share:.1%}"><i></i>{share:.1%}</div></td>'


def _faults(numbers: Numbers) -> str:
    counts = {f"unreadable: {kind}": number for kind, number in numbers["faults"].items()} | dict(numbers["filtered"])
    if not counts:
        return ""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{number:,}</td></tr>" for name, number in counts.items())
    return f'<h2>Not among the samples</h2>\n<table class="narrow"><tbody>{rows}</tbody></table>'


def _wall(name: str, shown: list[dict[str, Any]], unit: str) -> str:
    return f'<h2>The {name}</h2>\n<div class="wall">{"".join(_tile(each, unit) for each in shown)}</div>'


def _tile(told: dict[str, Any], unit: str) -> str:
    image = f'<img alt="" src="{told["thumbnail"]}">' if told.get("thumbnail") else ""
    plural = "s" if told["images"] != 1 else ""
    counts = f"{told['length']:,} {unit}, {told['supervised']:,} learned, {told['images']} image{plural}"
    return (
        f'<figure title="{escape(told["where"])}">{image}<figcaption><small>{escape(told["id"])}<br>{counts}</small>'
        f"<p>{escape(told['text'])}</p></figcaption></figure>"
    )


def thumbnail(index: Index, number: int) -> str:
    """The first image of a sample as a data URI; nothing where there is none that can be read."""
    try:
        images = index.sample(number).images
        if not images:
            return ""
        image = open_image(images[0], THUMBNAIL)
    except ValueError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    memory = BytesIO()
    image.save(memory, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(memory.getvalue()).decode()
