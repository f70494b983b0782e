"""What a data set is made of, to look at: one page and one picture of `mllm.data.curation.statistics`.

Enters: the numbers, and examples of the data. Leaves: `stats.html`, one file that needs no other, `stats.png`, and
`stats.json`, the numbers themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm.evaluate.data_report.figure import draw_figure
from mllm.evaluate.data_report.page import render_page


def write_data_report(
    folder: Path, title: str, numbers: Mapping[str, Any], examples: Mapping[str, list[dict[str, Any]]]
) -> list[Path]:
    """Write page, picture and numbers into `folder`; an example may bring a `thumbnail`, which the page alone shows."""
    folder.mkdir(parents=True, exist_ok=True)
    page, figure, data = (folder / f"stats.{kind}" for kind in ("html", "png", "json"))
    page.write_text(render_page(title, numbers, examples), encoding="utf-8")
    draw_figure(title, numbers, figure)
    told = {
        name: [{key: value for key, value in each.items() if key != "thumbnail"} for each in shown]
        for name, shown in examples.items()
    }
    data.write_text(json.dumps({"title": title, **numbers, **told}, indent=1, ensure_ascii=False), encoding="utf-8")
    return [page, figure, data]
