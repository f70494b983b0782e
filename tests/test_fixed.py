"""What a CUDA graph would record, run as it stands: the same tokens as the ordinary way."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from conftest import LLM_CONFIGS, make_model
from mllm.decoding import recorded
from mllm.decoding.compiled import attention_for_one, compiled_layers, compiler
from mllm.decoding.fixed import FixedForward
from mllm.decoding.fused import fusable
from mllm.decoding.greedy import Greedy
from mllm.decoding.prompt import Prompt
from test_generate import sharp

ASKED = list(range(7, 24))


def greedy_of(family: str, **settings: Any) -> Greedy:
    model = sharp(make_model(family, "eager" if family == "gemma2" else "sdpa", **settings))
    return Greedy(model, [], torch.device("cpu"))


def prompt(tokens: list[int]) -> Prompt:
    return Prompt(tokens, list(tokens), [])


def steps(greedy: Greedy, token: int, number: int, attention: str = "") -> list[int]:
    """Tokens behind this one, by the fixed forward."""
    forward = FixedForward(greedy.model.llm, greedy.cache, 1, attention)
    forward.token.fill_(token)
    forward.positions.fill_(len(greedy.marks))
    found = []
    for _ in range(number):
        forward()
        found.append(int(forward.token))
    return found


@pytest.mark.parametrize("family", LLM_CONFIGS)
@torch.no_grad()
def test_fixed_steps_find_the_tokens_of_the_ordinary_way(family: str) -> None:
    ordinary, greedy = greedy_of(family), greedy_of(family)
    found = list(ordinary.answer(prompt(ASKED), 12))
    first = greedy.prefill(prompt(ASKED))
    assert [first, *steps(greedy, first, 11)] == found
    written = len(ordinary.marks)
    for mine, theirs in zip(greedy.cache.layers, ordinary.cache.layers, strict=True):
        torch.testing.assert_close(mine.values[:, :, :written], theirs.values[:, :, :written], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", LLM_CONFIGS)
@torch.no_grad()
def test_padded_chunk_finds_the_token_of_the_ordinary_way(family: str) -> None:
    expected = greedy_of(family).prefill(prompt(ASKED))
    greedy = greedy_of(family)
    greedy.prefill(prompt(ASKED[:10]))
    forward = FixedForward(greedy.model.llm, greedy.cache, 16)
    forward.embeddings[:, :7] = prompt(ASKED).embeddings(greedy.model, 10, greedy.device)
    forward.positions.copy_(torch.arange(10, 26))
    forward.last.fill_(6)
    forward()
    assert int(forward.token) == expected


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_compiled_layers_find_the_same_tokens(family: str) -> None:
    """And the layers are as they were afterwards. `aot_eager` traces as the compiler does, without its kernels."""
    greedy = greedy_of(family)
    expected = list(greedy.answer(prompt(ASKED), 8))
    before = greedy.model.llm.config._attn_implementation
    greedy = greedy_of(family)
    first = greedy.prefill(prompt(ASKED))
    torch._dynamo.reset()
    with compiled_layers(greedy.model.llm, greedy.cache, compiler("aot_eager")):
        assert [first, *steps(greedy, first, 7, attention_for_one(greedy.model.llm))] == expected
    assert greedy.model.llm.config._attn_implementation == before
    greedy.marks = []
    assert list(greedy.answer(prompt(ASKED), 8)) == expected


@torch.no_grad()
def test_layers_are_compiled_once_for_all() -> None:
    """12 layers, one graph: else a model of 28 would take minutes."""
    greedy = greedy_of("qwen2", num_hidden_layers=12)
    first = greedy.prefill(prompt(ASKED))
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with compiled_layers(greedy.model.llm, greedy.cache, compiler(backend)):
        steps(greedy, first, 3, attention_for_one(greedy.model.llm))
    assert len(graphs) == 1


class Played:
    """In the place of a CUDA graph: what it would replay, run."""

    def __init__(self, forward: FixedForward, around: Any) -> None:
        self.forward, self.around = forward, around

    @torch.no_grad()
    def replay(self) -> None:
        with self.around:
            self.forward()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device's bookkeeping on this machine."""
    monkeypatch.setattr(recorded, "Recording", Played)
    monkeypatch.setattr(torch.cuda, "Event", MagicMock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.parametrize("family", ["llama", "qwen2_sliding", "gemma2"])
def test_conversation_from_recordings_is_that_of_the_ordinary_way(played: None, family: str) -> None:
    """Long first prompts, later ones of one chunk and of several, buffers that grow, answers left in the middle."""
    ordinary, drawn = greedy_of(family, max_position_embeddings=2048), torch.Generator().manual_seed(0)
    quick = recorded.RecordedGreedy(ordinary.model, [], ordinary.device, compiled=False)
    said: list[int] = []
    for new, most in ((150, 8), (20, 30), (100, 3), (1, 5), (400, 4), (60, 9)):
        said = [*said, *torch.randint(7, 300, (new,), generator=drawn).tolist()]
        found = list(quick.answer(prompt(said), most))
        assert found == list(ordinary.answer(prompt(said), most))
        assert quick.prefilled == ordinary.prefilled
        assert quick.marks == ordinary.marks
        next(iter(quick.answer(prompt([*said, *found, 9]), most)))  # a reader who goes away
        said += found[: most // 2]
    assert quick.refused == ""
    assert sorted(quick.recordings) == [1, recorded.CHUNK]


def test_llm_that_cannot_be_recorded_says_so_once_and_answers(played: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore words")

    monkeypatch.setattr(recorded, "Recording", broken)
    ordinary = greedy_of("llama")
    quick = recorded.RecordedGreedy(ordinary.model, [], ordinary.device, compiled=False)
    with pytest.warns(UserWarning, match="operation not permitted") as told:
        found = list(quick.answer(prompt(ASKED), 8))
    assert len(told) == 1
    assert found == list(ordinary.answer(prompt(ASKED), 8))


def test_own_kernels_are_for_plain_weights_of_their_kind_alone() -> None:
    fitting = make_model("qwen2", head_dim=32).llm.bfloat16()
    assert fusable(fitting)
    assert fusable(make_model("llama", head_dim=64).llm.half())
    for family in ("qwen2_sliding", "mistral", "qwen3", "gemma", "phi3"):
        assert not fusable(make_model(family, head_dim=32).llm.bfloat16()), family
    assert not fusable(make_model("qwen2", head_dim=32).llm)  # float32
    assert not fusable(make_model("qwen2").llm.bfloat16())  # heads of 8
    adapted = fitting.get_decoder().layers[1].mlp

    class Adapted(torch.nn.Linear):
        """In the place of a LoRA."""

    adapted.up_proj = Adapted(32, 64, bias=False)
    assert not fusable(fitting)


def test_quicker_way_is_kept(played: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = greedy_of("llama")
    quick = recorded.RecordedGreedy(ordinary.model, [], ordinary.device, compiled=True)
    tried: list[str] = []

    def way(name: str, seconds: float) -> Any:
        def make(greedy: Any) -> Played:
            tried.append(name)
            made = Played(FixedForward(greedy.model.llm, greedy.cache, 1), nullcontext())
            made.seconds = lambda: seconds  # type: ignore[attr-defined]
            return made

        return make

    monkeypatch.setattr(recorded, "WAYS", {"fused": way("fused", 2.0), "compiled": way("compiled", 1.0)})
    for most in (4, 1500):  # the second time in larger buffers
        assert next(iter(quick.answer(prompt(ASKED), most))) == next(iter(ordinary.answer(prompt(ASKED), most)))
        list(quick.answer(prompt(ASKED), 3))
        quick.cache.reserve(3000 if most == 4 else 1)
    assert quick.ways == ["compiled"]
    assert tried == ["fused", "compiled", "compiled"]


def test_way_that_fails_leaves_the_others(played: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = greedy_of("llama")
    quick = recorded.RecordedGreedy(ordinary.model, [], ordinary.device, compiled=True)

    def broken(_: Any) -> None:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(recorded, "WAYS", {"fused": lambda _: None, "compiled": broken})
    assert list(quick.answer(prompt(ASKED), 8)) == list(ordinary.answer(prompt(ASKED), 8))
    assert (quick.refused, quick.failed) == ("", {"compiled": "no compiler found"})
