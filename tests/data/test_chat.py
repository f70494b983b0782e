"""Labels cover exactly the assistant's words and the end mark behind them, whatever the chat template."""

from __future__ import annotations

from itertools import groupby

import pytest
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conftest import make_tokenizer
from families import CHATML, FAMILIES, GEMMA, IM, LLAMA2, MISTRAL, Family
from mllm.data import chat
from mllm.types import IGNORE_INDEX, Message
from shared_data import shared

TOKENIZERS = {name: family.tokenizer() for name, family in FAMILIES.items()}
TOKENIZERS["none"].chat_template = chat.DEFAULT_TEMPLATE
ANSWERS = {
    "word": "red",
    "in-question": "what colour is the circle?",
    "of-a-role": "assistant",
    "unicode": "naïve 猫 🐈‍⬛ e\u0301 \u202e ß",
    "code": "def f():\n    if x:\n\n        return  1",
    "space-before": "  red",
    "space-behind": "red ",
    "lines-behind": "red \n\n",
    "new-lines": "\n\nred\n",
    "one-letter": "a",
    "point": ".",
    "jinja": "{{ messages }} {% raise %}",
    "regex": r"a\1 (b|c)* $",
}


def talk(*answers: str, system: str = "") -> list[Message]:
    """A conversation with these answers."""
    messages = [Message("system", [system])] if system else []
    for answer in answers:
        messages += [Message("user", ["what colour is the circle?"]), Message("assistant", [answer])]
    return messages


def supervised(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[str]:
    """The text of each unbroken run of labels."""
    ids, labels = chat.encode(tokenizer, messages)
    assert len(ids) == len(labels)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    runs = groupby(labels, key=lambda label: label != IGNORE_INDEX)
    return [tokenizer.decode(list(run), clean_up_tokenization_spaces=False) for spoken, run in runs if spoken]


def expected(family: Family, answer: str) -> str:
    return ((answer.strip() if family.trims else answer) + family.end).strip()


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_labels_cover_only_assistant_words(name: str, answer: str) -> None:
    [run] = supervised(TOKENIZERS[name], talk(answer))
    wanted = expected(FAMILIES[name], answer)
    if name in ("qwen3", "smollm3"):  # print the last answer without its first new lines
        wanted = wanted.lstrip("\n")
    assert run.strip() == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_cover_every_turn_of_a_long_conversation(name: str) -> None:
    answers = ["red", "assistant", "red", "what colour", *(f"answer {i}" for i in range(12))]
    runs = supervised(TOKENIZERS[name], talk(*answers))
    assert [run.strip() for run in runs] == [expected(FAMILIES[name], answer) for answer in answers]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.system])
def test_system_words_are_never_labelled(name: str) -> None:
    runs = supervised(TOKENIZERS[name], talk("red", "blue", system="Say red and blue."))
    assert [run.strip() for run in runs] == [expected(FAMILIES[name], answer) for answer in ("red", "blue")]


@pytest.mark.parametrize("name", FAMILIES)
def test_white_space_around_an_earlier_answer_keeps_labels_right(name: str) -> None:
    runs = supervised(TOKENIZERS[name], talk("  red \n", "blue  "))
    end = FAMILIES[name].end.strip()
    assert ["".join(run.split()) for run in runs] == [f"red{end}", f"blue{end}"]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_is_a_prefix_of_the_training_ids(name: str) -> None:
    for messages in (talk("red"), talk("red", "a large square", "blue")):
        ids, labels = chat.encode(TOKENIZERS[name], messages)
        prompt = chat.encode_prompt(TOKENIZERS[name], messages[:-1])
        assert ids[: len(prompt)] == prompt
        assert all(label != IGNORE_INDEX for label in labels[len(prompt) : len(prompt) + 1])


@pytest.mark.parametrize("name", FAMILIES)
def test_end_mark_is_the_token_that_generation_stops_at(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert tokenizer.convert_ids_to_tokens(chat.end_mark_id(tokenizer)) == FAMILIES[name].end.strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_holds_an_end_mark_is_covered_whole(name: str) -> None:
    answer = f"say {FAMILIES[name].end} twice"
    [run] = supervised(TOKENIZERS[name], talk(answer))
    assert "".join(run.split()) == "".join((answer + FAMILIES[name].end).split())


def test_answers_that_look_like_our_markers_are_only_words() -> None:
    tokenizer, answers = TOKENIZERS["qwen2"], ("mllmAnswer0mllm", "mllm0Answer1mllm", "mllm1Answer")
    assert supervised(tokenizer, talk(*answers)) == [f"{answer}<|im_end|>" for answer in answers]


def test_an_empty_earlier_answer_teaches_only_its_end() -> None:
    assert supervised(TOKENIZERS["qwen2"], talk("", "red")) == ["<|im_end|>", "red<|im_end|>"]


def test_thinking_is_no_label_and_is_in_the_prompt() -> None:
    tokenizer = TOKENIZERS["qwen3"]
    text = chat.render(tokenizer, talk("red", "blue"))
    assert text.count("<think>") == 1
    assert text.endswith("<think>\n\n</think>\n\nblue<|im_end|>\n")
    assert chat.render(tokenizer, talk("red")[:1], prompt=True).endswith("assistant\n<think>\n\n</think>\n\n")
    assert supervised(tokenizer, talk("red", "blue")) == ["red<|im_end|>", "blue<|im_end|>"]


def test_a_template_that_prints_todays_date_prints_the_same_every_day() -> None:
    """SmolLM3 and Llama 3.1 do: lengths in a stored index, and a run resumed after midnight, must not hang on it."""
    tokenizer = FAMILIES["smollm3"].tokenizer()
    assert "26 July 2024" not in chat.render(tokenizer, talk("red"))
    chat.ensure_template(tokenizer)
    text = chat.render(tokenizer, talk("red"))
    assert text.startswith("<|im_start|>system\n## Metadata\n\nToday Date: 26 July 2024\nReasoning Mode: /no_think")
    assert supervised(tokenizer, talk("red", "blue")) == ["red<|im_end|>", "blue<|im_end|>"]


def test_offsets_without_their_spaces_lose_no_label() -> None:
    tokenizer = FAMILIES["llama3"].tokenizer()  # as the real one: ByteLevel trims offsets behind the template
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert supervised(tokenizer, talk(ANSWERS["code"])) == [ANSWERS["code"] + "<|eot_id|>"]


def test_an_end_mark_that_is_not_flagged_special_is_learned() -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens(list(IM))
    assert supervised(tokenizer, talk("red")) == ["red<|im_end|>"]


def test_a_template_without_end_mark_labels_the_words_alone() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert [run.strip() for run in supervised(tokenizer, talk("red", "blue"))] == ["red", "blue"]
    assert chat.end_mark_id(tokenizer) is None


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "twice"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "not at all"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "not at all"),
        ("{% for m in messages %}{{ m.content | replace('red', 'blue') }}{% endfor %}", "changes"),
        ("{% for m in messages %}{{ m.content[:12] }}{% endfor %}", "not at all"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].content | length }}", "changes"),
    ],
)
def test_a_template_that_spoils_answers_is_refused_by_name(template: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"tests' tokenizer.*{words}"):
        chat.encode(make_tokenizer(template), talk("red"))


@pytest.mark.parametrize("template", [LLAMA2, MISTRAL], ids=["llama2", "mistral"])
def test_roles_that_do_not_alternate_are_refused_with_the_turns(template: str) -> None:
    messages = [*talk("red"), Message("assistant", ["blue"])]
    with pytest.raises(ValueError, match="refuses the turns user, assistant, assistant: Conversation roles"):
        chat.encode(make_tokenizer(template), messages)


def test_a_system_turn_that_the_template_refuses_is_told() -> None:
    with pytest.raises(ValueError, match="refuses the turns system, user, assistant: System role not supported"):
        chat.encode(make_tokenizer(GEMMA), talk("red", system="be brief"))


def test_a_tokenizer_without_template_gets_the_default_with_a_warning() -> None:
    tokenizer = make_tokenizer(None)
    with pytest.warns(UserWarning, match="tests' tokenizer has no chat template"):
        chat.ensure_template(tokenizer)
    assert tokenizer.chat_template == chat.DEFAULT_TEMPLATE


def test_a_tokenizer_without_template_and_without_an_end_is_refused() -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"neither a chat template nor an eos token"):
        chat.ensure_template(tokenizer)


def test_a_slow_tokenizer_is_refused_with_the_remedy() -> None:
    tokenizer = make_tokenizer()
    slow = type("Slow", (), {"is_fast": False, "chat_template": "x", "name_or_path": tokenizer.name_or_path})()
    with pytest.raises(ValueError, match=r"slow tokenizer.*tokenizer\.json"):
        chat.ensure_template(slow)


@pytest.mark.parametrize("name", ["qwen2", "llama3", "llama2", "zephyr", "none"])
def test_gpt2s_real_merges_keep_labels_on_the_assistants_words(name: str) -> None:
    folder = shared("tokenizers") / "gpt2"
    pieces = ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    tokenizer, family = PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer), FAMILIES[name]
    tokenizer.add_tokens([*family.special, family.end], special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": family.eos, "bos_token": "<s>"})
    tokenizer.chat_template = family.template or chat.DEFAULT_TEMPLATE
    answers = ["red", "def f():\n    return  1", "naïve 猫", "assistant:"]
    runs = supervised(tokenizer, talk(*answers))
    assert [run.strip() for run in runs] == [expected(family, answer) for answer in answers]
