"""A report that a person enjoys: what the model saw, what it was asked, what it said, and how it learned.

Enters: results of `mllm.evaluate.exact`, the metrics of each stage, the seconds of each step. Leaves:
`report.html`, one file that needs no other, and `report.png`, the same story as one picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mllm.evaluate.exact import Result
from mllm.evaluate.report.figure import draw_figure
from mllm.evaluate.report.page import render_page
from mllm.evaluate.report.story import tell


def write_report(
    folder: Path,
    title: str,
    results: Mapping[str, Result],
    curves: Mapping[str, Path],
    seconds: Mapping[str, float],
    *,
    show: tuple[str, ...] = ("plain", "compositional"),
    number_shown: int = 18,
    meaning: Mapping[str, str] | None = None,
) -> tuple[Path, Path]:
    """Write `report.html` and `report.png` into `folder`; returns both paths.

    `results` is named by test set or control, in the order of its bars; `curves` names each stage's `metrics.jsonl`,
    in the order of training. The gallery takes `number_shown` answers from the results named in `show`;
    `meaning` may say of each result what was asked.
    """
    story = tell(title, results, curves, seconds, show, number_shown, meaning or {})
    folder.mkdir(parents=True, exist_ok=True)
    page, figure = folder / "report.html", folder / "report.png"
    page.write_text(render_page(story), encoding="utf-8")
    draw_figure(story, figure)
    return page, figure
