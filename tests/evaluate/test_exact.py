import json
from pathlib import Path

import pytest

from mllm.evaluate.exact import evaluate, questions, run
from mllm.types import Mark, Message, Sample


class Parrot:
    """Answers the last word of each question, and remembers how it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[Sample]] = []

    def answer(self, samples: list[Sample], max_new_tokens: int = 32) -> list[str]:
        self.batches.append(samples)
        return [sample.messages[-1].text.split()[-1] for sample in samples]


def conversation(name: str, *turns: tuple[str, str], **meta: str) -> Sample:
    """One image before the first question, as in LLaVA's files."""
    messages = [Message("system", ["be brief"])]
    for asked, told in turns:
        messages += [Message("user", [asked]), Message("assistant", [told])]
    messages[1].content[:0] = [Mark.IMAGE, "\n"]
    return Sample(name, messages, [f"{name}.png"], meta=meta)


THREE = conversation("three", ("say red", "Red."), ("say blue", "blue"), ("say one", "two"))


def test_every_question_of_a_conversation_is_scored() -> None:
    result = evaluate(Parrot(), [THREE])
    assert (result["correct"], result["number"]) == (2, 3)
    assert [answer["id"] for answer in result["answers"]] == ["three#1", "three#2", "three#3"]
    assert result["accuracy"] == pytest.approx(2 / 3)


def test_a_question_from_a_later_turn_still_has_its_image() -> None:
    later = questions([THREE])[2].sample
    assert [message.role for message in later.messages] == ["system", "user"]
    assert later.messages[-1].content == [Mark.IMAGE, "\n", "say one"]
    assert later.images == ["three.png"]


def test_a_question_asked_alone_is_written_as_the_first_turn_was() -> None:
    first, second, _ = questions([THREE])
    assert first.sample.messages[-1].content[:2] == second.sample.messages[-1].content[:2]


def test_with_history_the_earlier_turns_and_their_gold_answers_stay() -> None:
    later = questions([THREE], history=True)[2].sample
    assert later.messages == THREE.messages[:-1]
    assert later.images == ["three.png"]


@pytest.mark.parametrize("history", [False, True])
def test_images_always_match_their_marks_and_later_ones_stay_hidden(history: bool) -> None:
    messages = [Message("user", [Mark.IMAGE, "a"]), Message("assistant", ["1"])]
    messages += [Message("user", ["b", Mark.IMAGE]), Message("assistant", ["2"])]
    messages += [Message("user", ["c"]), Message("assistant", ["3"])]
    asked = [question.sample for question in questions([Sample("x", messages, ["1.png", "2.png"])], history)]
    assert all(sum(m.num_images for m in sample.messages) == len(sample.images) for sample in asked)
    assert asked[0].images == ["1.png"]
    assert asked[1].images == (["1.png", "2.png"] if history else ["2.png"])
    assert asked[2].images == ["1.png", "2.png"]


def test_accuracy_is_told_by_type() -> None:
    samples = [
        conversation("a", ("say red", "red"), type="colour"),
        conversation("b", ("say red", "blue"), type="colour"),
        conversation("c", ("say two", "two"), type="count"),
    ]
    by_type = evaluate(Parrot(), samples)["by_type"]
    assert {kind: (score["accuracy"], score["number"]) for kind, score in by_type.items()} == {
        "colour": (0.5, 2),
        "count": (1.0, 1),
    }


def test_records_without_a_type_are_one_group() -> None:
    assert list(evaluate(Parrot(), [THREE])["by_type"]) == ["all"]


def test_batches_are_no_larger_than_asked_and_progress_reaches_the_end() -> None:
    parrot, told = Parrot(), []
    evaluate(parrot, [THREE] * 3, batch_size=4, progress=lambda done, total: told.append((done, total)))
    assert [len(batch) for batch in parrot.batches] == [4, 4, 1]
    assert told == [(4, 9), (8, 9), (9, 9)]


def test_a_result_survives_json() -> None:
    result = evaluate(Parrot(), [THREE])
    again = json.loads(json.dumps(result))
    assert again["answers"] == result["answers"]
    assert again["answers"][0]["image"] == "three.png"


def test_an_answer_without_a_question_is_named() -> None:
    with pytest.raises(ValueError, match=r"file\.json, row 7: answer 1 follows no question"):
        questions([Sample("x", [Message("assistant", ["hm"])], where="file.json, row 7")])


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(Parrot(), [])


def test_a_run_writes_the_result_and_shows_each_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [conversation("a", ("say red", "red"), type="colour"), conversation("b", ("say 2", "3"), type="count")]
    result = run(Parrot(), samples, tmp_path / "out" / "result.json")
    assert json.loads((tmp_path / "out" / "result.json").read_text())["answers"] == result["answers"]
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("colour", "count", "all", "50.0%"))
