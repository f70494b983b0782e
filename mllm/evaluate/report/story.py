"""What a report tells, before anyone decides how it looks: the page and the figure both draw this.

Enters: results, metric files, seconds. Leaves: a `Story`. Nothing here knows of HTML or of matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

from mllm.evaluate.exact import Answer, Result

SHARE_WRONG = 1 / 3
"""Of the gallery, where there are so many: wrong answers teach more than they occur."""

COLOURS = ("#3b6fd4", "#8a5cc2", "#d98a2b", "#9aa1ab", "#2f9e8f", "#c2557a")
"""One a result, in order; the first two are the model, the next two its controls. Legible on white and on black."""

STAGE_COLOURS = ("#2f9e8f", "#c2557a")
RIGHT, WRONG = "#2e9e5b", "#d64545"


@dataclass(frozen=True)
class Curve:
    """The loss of one stage, a point a logged step."""

    name: str
    steps: list[int]
    loss: list[float]

    @property
    def smooth(self) -> list[float]:
        """The mean of the 2 % of the stage before and after each step: centred, so that it does not lag."""
        reach = max(1, len(self.loss) // 50)
        return [fmean(self.loss[max(0, at - reach) : at + reach + 1]) for at in range(len(self.loss))]


@dataclass(frozen=True)
class Story:
    title: str
    results: Mapping[str, Result]
    curves: list[Curve]
    seconds: Mapping[str, float]
    gallery: list[Answer]
    meaning: Mapping[str, str]

    @property
    def colours(self) -> dict[str, str]:
        return {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(self.results)}

    @property
    def notes(self) -> dict[str, str]:
        """What stands below each accuracy: the interval and the number of questions."""
        return {name: _note(result) for name, result in self.results.items()}

    @property
    def types(self) -> list[str]:
        """Every question type of any result, in the order in which they appear."""
        return list(dict.fromkeys(name for result in self.results.values() for name in result["by_type"]))

    @property
    def gallery_note(self) -> str:
        wrong = sum(not answer["correct"] for answer in self.gallery)
        return f"{len(self.gallery) - wrong} right and {wrong} wrong, not in the proportion in which they occur"


def tell(
    title: str,
    results: Mapping[str, Result],
    curves: Mapping[str, Path],
    seconds: Mapping[str, float],
    show: Iterable[str],
    number_shown: int,
    meaning: Mapping[str, str],
) -> Story:
    """Read the curves and choose the gallery."""
    layers = zip_longest(*(results[name]["answers"] for name in show if name in results))
    shown = [answer for layer in layers for answer in layer if answer]  # in turn, so that none fills the gallery
    read = [read_curve(name, path) for name, path in curves.items()]
    return Story(title, results, read, seconds, choose_gallery(shown, number_shown), meaning)


def read_curve(name: str, path: Path) -> Curve:
    """The `step` and `loss` of each line of a stage's `metrics.jsonl`."""
    points = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    points = [point for point in points if "loss" in point]
    return Curve(name, [point["step"] for point in points], [float(point["loss"]) for point in points])


def choose_gallery(answers: list[Answer], number: int) -> list[Answer]:
    """Right ones, then wrong ones: the question types in turn, each picture once while there are new ones."""
    pictured = [answer for answer in answers if answer["image"] and Path(answer["image"]).is_file()]
    right = [answer for answer in pictured if answer["correct"]]
    wrong = [answer for answer in pictured if not answer["correct"]]
    number_wrong = min(len(wrong), max(round(number * SHARE_WRONG), number - len(right)))
    seen: set[str | None] = set()
    shown_wrong = _take_turns(wrong, number_wrong, seen)
    return _take_turns(right, number - number_wrong, seen) + shown_wrong


def _note(result: Result) -> str:
    low, high = result["interval"]
    return f"{low:.1%} – {high:.1%}, {result['number']:,} questions"


def _take_turns(answers: list[Answer], number: int, seen: set[str | None]) -> list[Answer]:
    """At most `number` answers, one of each type, again and again; adds their pictures to `seen`."""
    waiting: dict[str, list[Answer]] = {}
    for answer in answers:
        waiting.setdefault(answer["type"], []).append(answer)
    taken: list[Answer] = []
    while waiting and len(taken) < number:
        kind = next(iter(waiting))
        queue = waiting.pop(kind)
        at = next((at for at, answer in enumerate(queue) if answer["image"] not in seen), 0)
        taken.append(queue.pop(at))
        seen.add(taken[-1]["image"])
        if queue:
            waiting[kind] = queue  # popped and put back: the type now stands last
    return taken
