"""A conversation keeps what it computed, and its answers are those of one that keeps nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import LLM_CONFIGS, make_model, make_processor, picture
from mllm.decoding.cache import KeptCache, KeptLayer, capacity, keeps_everything
from mllm.decoding.prompt import common
from mllm.decoding.words import pieces
from mllm.generate import Assistant
from mllm.models.connectors import QFormerConnector
from mllm.types import ImageSource, Mark, Message, Sample
from test_generate import constant, sharp

MOST = 10


def assistant_of(family: str = "llama", **settings: Any) -> Assistant:
    return Assistant(sharp(make_model(family, **settings)), make_processor())


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """Images of each call."""
    calls: list[int] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    yield calls
    hook.remove()


def turns(*images: ImageSource, number: int = 3) -> Iterator[Sample]:
    """A conversation that grows: its images stand in the first question; the answer is filled in by the caller."""
    talk = Sample("talk", [], list(images))
    for turn in range(number):
        marks = [Mark.IMAGE] * len(images) if turn == 0 else []
        talk.messages.append(Message("user", [*marks, f"what is number {turn}?"]))
        yield talk


def converse(assistant: Assistant, *images: ImageSource, number: int = 3, most: int = MOST) -> list[str]:
    said = []
    for talk in turns(*images, number=number):
        said.append("".join(assistant.stream(talk, most)).strip())
        talk.messages.append(Message("assistant", [said[-1]]))
    return said


@pytest.mark.parametrize("family", LLM_CONFIGS)
def test_answers_are_those_of_a_conversation_without_anything_kept(family: str) -> None:
    """The window of the sliding families is shorter than the first prompt."""
    attention = "eager" if family == "gemma2" else "sdpa"
    assistant, new = assistant_of(family, attention=attention), assistant_of(family, attention=attention)
    for talk in turns(picture(1), picture(2)):
        kept = "".join(assistant.stream(talk, MOST)).strip()
        assert kept == new.answer([talk], MOST)[0]
        talk.messages.append(Message("assistant", [kept]))


def test_encoder_runs_once_for_an_image_of_a_conversation() -> None:
    assistant = assistant_of()
    with counted(assistant.model.vision_encoder) as calls:
        converse(assistant, picture(1), picture(2))
    assert calls == [1, 1]


def test_conversation_without_images_never_runs_the_encoder() -> None:
    assistant = assistant_of()
    with counted(assistant.model.vision_encoder) as calls:
        converse(assistant)
    assert calls == []


def test_later_turn_computes_its_new_tokens_alone() -> None:
    assistant = constant(make_processor().tokenizer.convert_tokens_to_ids("a"))
    for turn, talk in enumerate(turns(picture(1))):
        before = len(assistant.greedy.marks)
        said = "".join(assistant.stream(talk, MOST))
        whole = len(assistant.processor.prompt(talk).input_ids)
        assert assistant.greedy.prefilled == (whole - before if turn else whole)
        talk.messages.append(Message("assistant", [said]))


def test_same_question_again_computes_one_token() -> None:
    assistant, (talk, *_) = assistant_of(), turns(picture(1), number=1)
    first = list(assistant.stream(talk, MOST))
    assert list(assistant.stream(talk, MOST)) == first
    assert assistant.greedy.prefilled == 1


REWRITES = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content[:2] }}{% else %}{{ m.content }}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Cuts earlier answers short, as templates drop the thoughts of earlier turns."""


def test_template_that_rewrites_earlier_answers_changes_no_answer() -> None:
    assistant = Assistant(sharp(make_model()), make_processor(chat_template=REWRITES))
    new = Assistant(sharp(make_model()), make_processor(chat_template=REWRITES))
    for talk in turns(picture(1)):
        kept = "".join(assistant.stream(talk, MOST)).strip()
        assert kept == new.answer([talk], MOST)[0]
        talk.messages.append(Message("assistant", [kept]))


def test_other_image_in_the_same_words_is_another_conversation() -> None:
    assistant, new = assistant_of(), assistant_of()
    for seed in (1, 2, 1):
        (talk,) = turns(picture(seed), number=1)
        assert "".join(assistant.stream(talk, MOST)).strip() == new.answer([talk], MOST)[0]


def test_file_that_changed_between_turns_is_looked_at_again(tmp_path: Path) -> None:
    assistant, new, path = assistant_of(), assistant_of(), tmp_path / "image.png"
    for seed in (1, 2):
        picture(seed, (32, 32 + seed)).save(path)
        (talk,) = turns(path, number=1)
        assert "".join(assistant.stream(talk, MOST)).strip() == new.answer([talk], MOST)[0]


def test_answer_that_is_stopped_early_spoils_nothing() -> None:
    """Ctrl-C, or a reader who has heard enough: the next turn is exact all the same."""
    assistant, new = assistant_of(), assistant_of()
    (talk,) = turns(picture(1), number=1)
    begun = assistant.stream(talk, MOST)
    said = next(iter(begun))
    talk.messages += [Message("assistant", [said]), Message("user", ["and now?"])]
    assert "".join(assistant.stream(talk, MOST)).strip() == new.answer([talk], MOST)[0]
    with pytest.raises(ValueError, match="another one of the same assistant has begun"):
        list(begun)


def test_forward_that_breaks_off_in_the_middle_spoils_nothing() -> None:
    assistant, new = assistant_of(), assistant_of()
    (talk,) = turns(picture(1), number=1)
    "".join(assistant.stream(talk, MOST))
    talk.messages += [Message("assistant", ["something else"]), Message("user", ["and now?"])]
    last = assistant.model.llm.get_decoder().layers[-1]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = last.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(assistant.stream(talk, MOST))
    hook.remove()
    assert "".join(assistant.stream(talk, MOST)).strip() == new.answer([talk], MOST)[0]


def test_image_is_looked_at_again_where_the_connector_reads_the_question() -> None:
    small = QFormerConnector(num_queries=4, hidden_size=16, num_layers=2, num_heads=2, instruct=True)

    def reader() -> Assistant:
        model = sharp(make_model(connector=small))
        model.connector.apply(lambda m: m.weight.data.normal_(0, 0.3) if isinstance(m, torch.nn.Linear) else None)
        return Assistant(model, make_processor(instruct=True))

    torch.manual_seed(3)
    assistant = reader()
    answers = []
    with counted(assistant.model.connector) as calls:
        for question in ("what?", "what?", "why a red circle?"):
            talk = Sample("talk", [Message("user", [Mark.IMAGE, question])], [picture(1)])
            answers.append("".join(assistant.stream(talk, MOST)).strip())
            assert assistant.answer([talk], MOST) == answers[-1:]
    assert calls == [1, 1, 1, 1, 1]  # of `answer` three, of `stream` two


@pytest.mark.parametrize("form", ["path", "text", "bytes", "mapping", "picture"])
def test_image_is_known_again_by_any_name(tmp_path: Path, form: str) -> None:
    path = tmp_path / "image.png"
    picture(1).save(path)
    names = {
        "path": lambda: path,
        "text": lambda: f"file://{path}",
        "bytes": path.read_bytes,
        "mapping": lambda: {"bytes": None, "path": str(path)},
        "picture": lambda: picture(1),
    }
    assistant = assistant_of()
    with counted(assistant.model.vision_encoder) as calls:
        for _ in range(2):
            (talk,) = turns(names[form](), number=1)
            list(assistant.stream(talk, 2))
    assert calls == [1]


def test_recurrent_llm_answers_with_nothing_kept() -> None:
    """One whose states cannot be cut back goes through transformers' own loop."""
    model = sharp(make_model())
    assert keeps_everything(model.llm)
    model.llm._is_stateful = True
    assistant = Assistant(model, make_processor())
    assert assistant.greedy is None
    assert converse(assistant, picture(1)) == converse(assistant_of(), picture(1))


def test_buffers_hold_what_was_written_while_they_grow() -> None:
    torch.manual_seed(0)
    layer, written = KeptLayer(), torch.randn(1, 2, 1600, 4)
    for start in range(0, 1600, 100):
        part = written[:, :, start : start + 100]
        keys, values = layer.update(part, -part)
    assert torch.equal(keys, written)
    assert torch.equal(values, -written)


def test_capacities_are_few() -> None:
    assert [capacity(n) for n in (1, 512, 513, 769, 1025, 1537)] == [512, 512, 768, 1024, 1536, 2048]


def test_cutting_back_forgets_the_end_alone() -> None:
    cache, written = KeptCache(), torch.randn(1, 2, 8, 4)
    cache.update(written, written, 0)
    cache.keep(5)
    keys, _ = cache.update(written[:, :, :2], written[:, :, :2], 0)
    assert torch.equal(keys, torch.cat([written[:, :, :5], written[:, :, :2]], dim=2))


def test_common_beginning() -> None:
    assert [common([1, 2, 3], now) for now in ([1, 2, 4], [1, 2], [0], [1, 2, 3, 4], [])] == [2, 2, 0, 3, 0]


@pytest.mark.parametrize("text", ["plain words", "Grüße, 日本語 and 🦊🦊!", " lots   of blanks\n\n\nand lines " * 4])
def test_pieces_join_to_the_text(text: str) -> None:
    tokenizer = make_processor().tokenizer
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    told = list(pieces(tokenizer, tokens))
    assert "".join(told) == text
    assert len(told) > 2
