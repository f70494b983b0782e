"""Answers: alone, in a batch, word by word and by a naive loop they are the same."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_model, make_processor, make_sample, picture
from mllm.data.collate import collate
from mllm.data.packing import join
from mllm.decoding.words import from_first_word
from mllm.generate import Assistant, find_folder, newest_stage, stop_ids
from mllm.train.losses import model_inputs
from mllm.types import Mark, Message, Sample


def sharp(model: Any) -> Any:
    """Random weights of tiny LLMs answer nearly alike: larger ones make every token count."""
    torch.manual_seed(7)
    for name, p in model.llm.named_parameters():
        if p.ndim == 2:
            p.data.normal_(0, 0.6 if "embed" in name or "lm_head" in name else 0.25)
    return model


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def assistant(request: Any) -> Assistant:
    return Assistant(sharp(make_model(request.param)), make_processor())


def ask(seed: int, num_images: int, extra: str = "") -> Sample:
    sample = make_sample(seed, num_images=num_images, extra=extra)
    return Sample(sample.id, sample.messages[:-1], sample.images)


def questions() -> list[Sample]:
    """Lengths, images and turns all differ."""
    several = make_sample(5, num_images=1, turns=3)
    return [
        ask(1, 1),
        ask(2, 0, extra="a longer question without any image, "),
        ask(3, 2),
        ask(4, 0),
        Sample("turns", several.messages[:-1], several.images),
    ]


def naive(assistant: Assistant, sample: Sample, most: int) -> list[int]:
    """Greedy by hand: the whole sequence again for each token, no cache, through the training forward."""
    model, prompt = assistant.model, assistant.processor.prompt(sample)
    found: list[int] = []
    while len(found) < most:
        ids = torch.tensor([prompt.input_ids + found])
        pixels = prompt.pixel_values if len(prompt.pixel_values) else torch.zeros(1, 3, 28, 28)
        with torch.no_grad():
            states = model(ids, torch.arange(ids.shape[1])[None], pixels, len(prompt.pixel_values))
            found.append(int(model.logits(states[0, -1]).argmax()))
        if found[-1] in assistant.stop_ids:
            break
    return found


def test_batched_answers_equal_answers_one_by_one(assistant: Assistant) -> None:
    alone = [assistant.answer([sample], 12)[0] for sample in questions()]
    assert assistant.answer(questions(), 12) == alone
    assert len(set(alone)) == len(alone)


def test_order_of_the_batch_changes_no_answer(assistant: Assistant) -> None:
    assert assistant.answer(questions()[::-1], 8) == assistant.answer(questions(), 8)[::-1]


def test_stream_equals_answer(assistant: Assistant) -> None:
    for sample in questions():
        assert "".join(assistant.stream(sample, 12)).strip() == assistant.answer([sample], 12)[0]


def test_streamed_answer_starts_with_its_first_word() -> None:
    assert list(from_first_word(["", " ", "  top", " left", " "])) == ["top", " left", " "]


def test_greedy_tokens_equal_a_naive_loop_without_a_cache(assistant: Assistant) -> None:
    for sample in questions():
        assert assistant.answer([sample], 10)[0] == assistant.decode(naive(assistant, sample, 10))


def test_image_changes_the_answer(assistant: Assistant) -> None:
    one, other = ask(1, 1), ask(1, 1)
    other.images = [picture(77)]
    assert assistant.answer([one], 16) != assistant.answer([other], 16)


def test_same_question_twice_gives_the_same_answer(assistant: Assistant) -> None:
    assert assistant.answer([ask(1, 1)], 16) == assistant.answer([ask(1, 1)], 16)


def constant(token: int) -> Assistant:
    """An assistant whose LLM always says one token."""
    built = Assistant(make_model(), make_processor())
    head = built.model.llm.get_output_embeddings()
    head.register_forward_hook(lambda _m, _i, out: torch.nn.functional.one_hot(torch.tensor(token), 384) + 0 * out)
    return built


def test_decoding_stops_at_the_templates_end_mark() -> None:
    end = make_processor().tokenizer.convert_tokens_to_ids("<|end|>")
    calls: list[int] = []
    assistant = constant(end)
    assistant.model.llm.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    assert assistant.answer([ask(1, 1)], 50) == [""]
    assert "".join(assistant.stream(ask(1, 1), 50)) == ""
    assert len(calls) == 2


def test_decoding_without_an_end_mark_stops_at_the_limit() -> None:
    letter = make_processor().tokenizer.convert_tokens_to_ids("a")
    assert constant(letter).answer([ask(1, 1)], 5) == ["aaaaa"]
    assert "".join(constant(letter).stream(ask(1, 1), 5)) == "aaaaa"


def test_stop_ids_are_those_of_template_tokenizer_and_generation_config() -> None:
    model, processor = make_model(), make_processor()
    model.llm.generation_config.eos_token_id = [9, 11]
    assert stop_ids(model, processor) == [processor.tokenizer.convert_tokens_to_ids("<|end|>"), 9, 11]


@pytest.mark.timeout(60)
def test_error_while_streaming_is_raised_and_does_not_hang() -> None:
    assistant = Assistant(make_model(), make_processor())
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(assistant.stream(ask(1, 1), 0))


def test_mark_without_an_image_is_refused_before_anything_runs() -> None:
    assistant = Assistant(make_model(), make_processor())
    broken = Sample("x", [Message("user", [Mark.IMAGE, "what?"])], [])
    with pytest.raises(ValueError, match=r"1 <image> placeholders.*0 images"):
        assistant.answer([broken])


def test_prompt_is_what_training_saw_in_front_of_the_answer() -> None:
    """One prompt builder: the ids of a question are the ids of the training example up to its first label."""
    processor, sample = make_processor(), make_sample(3, num_images=2)
    example, prompt = processor(sample), processor.prompt(ask(3, 2))
    first = next(i for i, label in enumerate(example.labels) if label != -100)
    assert prompt.input_ids == example.input_ids[:first]


def test_teacher_forced_logits_of_a_packed_row_choose_the_answers_of_generation() -> None:
    """The route of training and the route of chat meet: an answer is the argmax of the packed training forward."""
    assistant = Assistant(sharp(make_model()), make_processor())
    sample = ask(1, 1)
    found = naive(assistant, sample, 6)
    prompt = assistant.processor.prompt(sample)
    prompt.input_ids = prompt.input_ids + found
    prompt.labels = [-100] * len(prompt.input_ids)
    shape = (3, 28, 28)
    other = assistant.processor(make_sample(9, num_images=2))
    inputs: Any = model_inputs(collate([join([other, prompt], shape)], shape), torch.device("cpu"))
    del inputs["labels"]
    with torch.no_grad():
        logits = assistant.model.logits(assistant.model(**inputs))[0]
    end = len(other.input_ids) + len(prompt.input_ids)
    assert logits[end - len(found) - 1 : end - 1].argmax(-1).tolist() == found


def test_encoder_that_normalises_otherwise_by_now_is_refused() -> None:
    model = make_model()
    model.vision_encoder.normalisation = replace(model.vision_encoder.normalisation, scale=1 / 127.5)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json now says"):
        Assistant(model, make_processor())


@pytest.mark.parametrize("name", ["no-such-model", "/no/such", "./no", "a/b/c", "no/such-model"])
def test_missing_model_is_one_line_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match="no such model") as raised:
        find_folder(name)
    assert name in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_newest_stage_is_the_one_that_finished_last(tmp_path: Path) -> None:
    assert newest_stage(tmp_path) is None
    for age, name in enumerate(("new", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "connector.safetensors").touch()
        os.utime(tmp_path / name / "connector.safetensors", (1000 - age, 1000 - age))
    (tmp_path / "unfinished").mkdir()
    assert newest_stage(tmp_path) == tmp_path / "new"


def test_answer_is_the_greedy_one_whatever_the_llms_generation_config_prefers() -> None:
    assistant = Assistant(sharp(make_model()), make_processor())
    before = assistant.answer(questions(), 12)
    settings = assistant.model.llm.generation_config
    settings.repetition_penalty, settings.temperature, settings.top_k, settings.do_sample = 5.0, 0.7, 5, True
    assert assistant.answer(questions(), 12) == before


@pytest.mark.parametrize("way", ["batch", "stream"])
def test_conversation_beyond_what_the_llm_has_learned_is_said_so(way: str) -> None:
    assistant = Assistant(make_model("llama", max_position_embeddings=40), make_processor())
    short, long = ask(0, 0), ask(0, 0, "and more of it, " * 20)

    def answer(sample: Sample) -> str:
        return assistant.answer([sample], 2)[0] if way == "batch" else "".join(assistant.stream(sample, 2))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer(short)
    with pytest.warns(UserWarning, match="the conversation has .* learned 40 positions: what comes later is new to it"):
        answer(long)
