"""Questions with one right answer: every assistant turn is asked, answered by the model, and compared.

Enters: samples with gold answers, and an assistant. Leaves: a `Result`, plain data that `json.dump` writes as
it is. A conversation of five turns is five questions, each asked alone: an early mistake cannot spoil, and an
early gold answer cannot give away, a later one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from mllm.evaluate.scorers import exact_match, wilson_interval
from mllm.types import Mark, Message, Sample

if TYPE_CHECKING:
    import rich.progress
    import rich.table

ONE_TYPE = "all"
"""The name of the only group where the records name no `type`."""

Progress = Callable[[int, int], None]
"""Told after each batch how many questions are answered, and of how many."""


class Answerer(Protocol):
    """What is asked: `mllm.generate.Assistant`, or a stand-in of a test."""

    def answer(self, samples: list[Sample], max_new_tokens: int = 32) -> list[str]: ...


@dataclass(frozen=True)
class Question:
    """`sample` ends with the user message to be answered; `answer` is the gold."""

    sample: Sample
    answer: str
    type: str

    @property
    def words(self) -> str:
        return self.sample.messages[-1].text.strip()

    @property
    def image(self) -> str | None:
        """The path of the first image; None where there is none, or none on disk."""
        first = next(iter(self.sample.images), None)
        return str(first) if isinstance(first, str | Path) else None


class Score(TypedDict):
    """`accuracy` and the two ends of its 95 % `interval` are fractions."""

    accuracy: float
    correct: int
    number: int
    interval: tuple[float, float]


class Answer(TypedDict):
    id: str
    question: str
    answer: str
    prediction: str
    correct: bool
    type: str
    image: str | None


class Result(Score):
    by_type: dict[str, Score]
    answers: list[Answer]


def questions(samples: list[Sample], history: bool = False) -> list[Question]:
    """Every assistant turn of every sample as one question, named `<sample id>#<turn>` from 1.

    Alone (the default) a question keeps system message and images; with `history` also the earlier turns and
    their gold answers. Images that first appear in a later turn are never shown.
    """
    return [question for sample in samples for question in _turns(sample, history)]


def evaluate(
    assistant: Answerer,
    samples: list[Sample],
    *,
    history: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    progress: Progress | None = None,
) -> Result:
    """Ask every question of `samples` and score the answers by `exact_match`."""
    asked = questions(samples, history)
    if not asked:
        raise ValueError(f"nothing to evaluate: {len(samples)} samples hold no assistant turn")
    predictions: list[str] = []
    for start in range(0, len(asked), batch_size):
        batch = [question.sample for question in asked[start : start + batch_size]]
        predictions += assistant.answer(batch, max_new_tokens=max_new_tokens)
        if progress:
            progress(len(predictions), len(asked))
    return summarise([_answered(*pair) for pair in zip(asked, predictions, strict=True)])


def summarise(answers: list[Answer]) -> Result:
    """The score of all answers and of each type, in the order in which the types appear."""
    by_type: dict[str, list[Answer]] = {}
    for answer in answers:
        by_type.setdefault(answer["type"], []).append(answer)
    return Result(
        **_score(answers),
        by_type={name: _score(group) for name, group in by_type.items()},
        answers=answers,
    )


def run(
    assistant: Answerer,
    samples: list[Sample],
    json_output: Path | None = None,
    history: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 32,
) -> Result:
    """`evaluate` as a person sees it: a progress bar, a table, and the whole result in `json_output` if named."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True) as bars:
        result = evaluate(
            assistant,
            samples,
            history=history,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=follow(bars, "questions"),
        )
    Console().print(table(result))
    if json_output:
        json_output.parent.mkdir(parents=True, exist_ok=True)
        json_output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def follow(bars: rich.progress.Progress, name: str) -> Progress:
    """A new bar, moved by `evaluate`."""
    task = bars.add_task(name)
    return lambda done, total: bars.update(task, completed=done, total=total)


def table(result: Result) -> rich.table.Table:
    """A line a question type, and one for all."""
    from rich.table import Table

    drawn = Table("type", "right", "of", "accuracy", "95 % interval")
    for name, score in {**result["by_type"], ONE_TYPE: result}.items():
        low, high = score["interval"]
        counts = f"{score['correct']:,}", f"{score['number']:,}"
        drawn.add_row(name, *counts, f"{score['accuracy']:.1%}", f"{low:.1%} – {high:.1%}")
    return drawn


def _turns(sample: Sample, history: bool) -> Iterator[Question]:
    answers = [at for at, message in enumerate(sample.messages) if message.role == "assistant"]
    for turn, at in enumerate(answers, start=1):
        before = sample.messages[:at]
        if not before or before[-1].role != "user":
            where = sample.where or sample.id
            raise ValueError(f"{where}: answer {turn} follows no question; expected a user message before it")
        asked = _ask(sample, before) if history else _ask_alone(sample, before)
        yield Question(
            sample=replace(asked, id=f"{sample.id}#{turn}"),
            answer=sample.messages[at].text,
            type=str(sample.meta.get("type", ONE_TYPE)),
        )


def _ask(sample: Sample, before: list[Message]) -> Sample:
    """The conversation up to its last question, with the images that were shown until then."""
    return replace(sample, messages=before, images=sample.images[: _count_images(before)])


def _ask_alone(sample: Sample, before: list[Message]) -> Sample:
    """The last question without the turns before it; where it has no image, theirs move to its front."""
    system, question = [message for message in before if message.role == "system"], before[-1]
    shown = sample.images[: _count_images(before)]
    if question.num_images:
        shown = shown[len(shown) - question.num_images :]
    else:
        opening: list[str | Mark] = [Mark.IMAGE] * len(shown)
        opening += ["\n"] if shown else []  # as LLaVA's records open a conversation
        question = Message("user", [*opening, *question.content])
    return replace(sample, messages=[*system, question], images=shown)


def _count_images(messages: list[Message]) -> int:
    return sum(message.num_images for message in messages)


def _answered(question: Question, prediction: str) -> Answer:
    return Answer(
        id=question.sample.id,
        question=question.words,
        answer=question.answer,
        prediction=prediction,
        correct=exact_match(prediction, question.answer),
        type=question.type,
        image=question.image,
    )


def _score(answers: list[Answer]) -> Score:
    correct, number = sum(answer["correct"] for answer in answers), len(answers)
    return Score(
        accuracy=correct / number,
        correct=correct,
        number=number,
        interval=wilson_interval(correct, number),
    )
