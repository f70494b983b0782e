"""Words around images: numbered over the conversation, the same in training and in chat, never learned."""

from __future__ import annotations

import pytest

from conftest import make_processor, picture
from mllm.data.processor import Processor
from mllm.types import IGNORE_INDEX, Mark, Message, Sample


@pytest.fixture
def numbered() -> Processor:
    plain = make_processor(2)
    return Processor(plain.tokenizer, plain.image_processor, 2, image_markers="numbered")


def conversation() -> Sample:
    messages = [
        Message("user", [Mark.IMAGE, Mark.IMAGE, "compare"]),
        Message("assistant", ["red"]),
        Message("user", ["and ", Mark.IMAGE, "?"]),
        Message("assistant", ["blue"]),
    ]
    return Sample("s", messages, [picture(i) for i in range(3)])


def around(number: int) -> str:
    return f"(image {number}: <Image><image><image></Image>)"


def test_numbers_run_over_the_whole_conversation(numbered: Processor) -> None:
    text = numbered.tokenizer.decode(numbered(conversation()).input_ids)
    said = f"<|user|>{around(1)}{around(2)}compare<|end|><|assistant|>red<|end|>"
    assert text == said + f"<|user|>and {around(3)}?<|end|><|assistant|>blue<|end|>"


def test_a_prompt_begins_the_training_ids(numbered: Processor) -> None:
    sample = conversation()
    question = Sample("q", sample.messages[:-1], sample.images)
    prompt, example = numbered.prompt(question), numbered(sample)
    assert example.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_what_stands_around_an_image_is_not_learned_in_an_answer(numbered: Processor) -> None:
    document = [Message("user", []), Message("assistant", ["red", Mark.IMAGE, "green", Mark.IMAGE, "blue"])]
    example = numbered(Sample("d", document, [picture(1), picture(2)]))
    said = [label for label in example.labels if label != IGNORE_INDEX]
    assert numbered.tokenizer.decode(said) == "redgreenblue<|end|>"
    assert around(2) in numbered.tokenizer.decode(example.input_ids)


def test_samples_of_one_image_are_numbered_too_and_none_without(numbered: Processor) -> None:
    one = Sample("s", [Message("user", [Mark.IMAGE, "x"]), Message("assistant", ["y"])], [picture(1)])
    none = Sample("s", [Message("user", ["x"]), Message("assistant", ["y"])])
    assert around(1) in numbered.tokenizer.decode(numbered(one).input_ids)
    assert numbered(none).input_ids == make_processor(2)(none).input_ids
