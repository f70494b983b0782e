"""What a trained model says to an image and a question.

Enters: a stage folder (or the Hub id of one) and conversations. Leaves: answers, whole and in batches, or word by
word. Chat and evaluation both speak through here, with the processor that trained the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mllm.config import stage_run
from mllm.data import chat
from mllm.data.collate import stack_instructions, stack_pixels
from mllm.data.processor import Processor
from mllm.decoding.cache import keeps_everything
from mllm.decoding.greedy import Greedy
from mllm.decoding.pictures import Pictures
from mllm.decoding.prompt import read
from mllm.decoding.recorded import RecordedGreedy
from mllm.decoding.threaded import words_of
from mllm.decoding.words import from_first_word, pieces
from mllm.models.attention import check_prompt
from mllm.models.build import build_model
from mllm.models.multimodal import MultimodalLM
from mllm.train.stage_folder import FINISHED, load_stage
from mllm.types import Example, Sample

Decoding = Literal["ordinary", "recorded", "compiled"]
"""`ordinary`: kernel by kernel. `recorded`: on a CUDA device, all kernels of a token at once. `compiled`: these
compiled too, which takes seconds at the first answer. Elsewhere all three are ordinary."""


class Assistant:
    """A loaded model with its processor."""

    def __init__(self, model: MultimodalLM, processor: Processor, decoding: Decoding = "recorded") -> None:
        """How it answers word by word is `decoding`, see `Decoding`.

        Raises:
            ValueError: the processor's pixels are not those that the encoder normalises.
        """
        self.model, self.processor = model.eval(), processor
        check_normalisation(model, processor)
        self.device = next(model.connector.parameters()).device
        self.stop_ids = stop_ids(model, processor)
        self.pictures = Pictures(self.model, processor)
        self.greedy = self.choose_greedy(decoding) if keeps_everything(model.llm) else None

    @classmethod
    def load(cls, model: str | Path, device: str | None = None, decoding: Decoding = "recorded") -> Assistant:
        """From a stage folder, or from the Hub repository of one.

        Raises:
            ValueError: there is no such folder or repository, or it holds no finished stage.
        """
        folder = find_folder(str(model))
        config = stage_run(folder).parts()
        processor = Processor.load(folder / "processor")
        built = build_model(config, processor.image_token_id, layout=processor.layout)
        load_stage(built, folder)
        return cls(built.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor, decoding)

    def choose_greedy(self, decoding: Decoding) -> Greedy:
        """Recorded kernels need a CUDA device, and weights that are plain tensors."""
        if decoding == "ordinary" or self.device.type != "cuda" or getattr(self.model.llm, "is_quantized", False):
            return Greedy(self.model, self.stop_ids, self.device)
        return RecordedGreedy(self.model, self.stop_ids, self.device, compiled=decoding == "compiled")

    @property
    def compiles(self) -> bool:
        """Will the first answer take longer than the others?"""
        return isinstance(self.greedy, RecordedGreedy) and self.greedy.compiled is not None

    @torch.inference_mode()
    def answer(self, samples: Sequence[Sample], max_new_tokens: int = 32) -> list[str]:
        """The greedy answer to each conversation, all in one batch; each ends with a user's message."""
        prompts = [self.processor.prompt(sample) for sample in samples]
        new = self.model.llm.generate(**self.inputs(prompts), **self.options(max_new_tokens))  # [B, new tokens]
        return [self.decode(tokens) for tokens in new.tolist()]

    def stream(self, sample: Sample, max_new_tokens: int = 256) -> Iterator[str]:
        """The greedy answer to one conversation, piece by piece as it is found.

        What was computed for the last conversation is kept: of one that goes on, only the new turn is computed.
        """
        if self.greedy is None:
            yield from from_first_word(self.streamed_whole(sample, max_new_tokens))
        else:
            yield from from_first_word(pieces(self.processor.tokenizer, self.tokens(sample, max_new_tokens)))

    def tokens(self, sample: Sample, max_new_tokens: int) -> Iterator[int]:
        """The same as token ids, without the one that ends it."""
        assert self.greedy is not None
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: an answer has at least one token")
        prompt = read(sample, self.pictures, self.device)
        self.heed_length(len(prompt))
        return self.greedy.answer(prompt, max_new_tokens)

    def streamed_whole(self, sample: Sample, max_new_tokens: int) -> Iterator[str]:
        """The same by transformers' own loop, with nothing kept: for LLMs with recurrent states."""
        with torch.inference_mode():
            inputs = self.inputs([self.processor.prompt(sample)])
        yield from words_of(self.model.llm, self.processor.tokenizer, {**inputs, **self.options(max_new_tokens)})

    def inputs(self, prompts: Sequence[Example]) -> dict[str, Tensor]:
        """Prompts side by side: embeddings [B, S, D] with visual tokens in place, padded on the left, and their
        mask."""
        longest = max(len(prompt.input_ids) for prompt in prompts)
        self.heed_length(longest)
        ids = torch.tensor([[0] * (longest - len(p.input_ids)) + p.input_ids for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p.input_ids)) + [1] * len(p.input_ids) for p in prompts])
        num_images = sum(len(prompt.pixel_values) for prompt in prompts)
        pixels = stack_pixels([prompt.pixel_values for prompt in prompts], self.processor.pixel_shape).to(self.device)
        instructions = stack_instructions([words for prompt in prompts for words in prompt.instructions])
        if instructions is not None:
            instructions = instructions.to(self.device)
        sizes = [size for prompt in prompts for size in prompt.image_sizes]
        visual = self.model.visual_tokens(pixels, instructions, sizes)
        embeddings = self.model.embed(ids, visual, num_images)  # [B, S, D]
        return {"inputs_embeds": embeddings, "attention_mask": mask.to(self.device)}

    def heed_length(self, length: int) -> None:
        """Say that a conversation is longer than what the LLM has learned, or refuse what it cannot count to."""
        if words := check_prompt(self.model.llm, length):
            warnings.warn(words, stacklevel=2)

    def options(self, max_new_tokens: int) -> dict[str, Any]:
        return {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "repetition_penalty": 1.0,  # Qwen2.5's own default is 1.1, and then the answer is not the greedy one
            "eos_token_id": self.stop_ids,
            "pad_token_id": self.stop_ids[0] if self.stop_ids else 0,
        }

    def decode(self, tokens: list[int]) -> str:
        """The words before the first end mark."""
        end = next((i for i, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        return str(self.processor.tokenizer.decode(tokens[:end], skip_special_tokens=True)).strip()


def check_normalisation(model: MultimodalLM, processor: Processor) -> None:
    """The processor was saved with the stage, the encoder comes from the Hub: do they still mean the same pixels?"""
    ours, theirs = processor.normalisation, model.vision_encoder.normalisation
    if ours is not None and ours != theirs:
        raise ValueError(
            f"the stage was trained on pixels normalised by {ours}, its vision encoder's preprocessor_config.json now "
            f"says {theirs}: restore that file, or pin the revision that it had"
        )


def stop_ids(model: MultimodalLM, processor: Processor) -> list[int]:
    """Where an answer ends: the template's end mark, the tokenizer's eos, the generation config's list."""
    listed = getattr(model.llm.generation_config, "eos_token_id", None)
    several = listed if isinstance(listed, list) else [listed]
    ids = [chat.end_mark_id(processor.tokenizer), processor.tokenizer.eos_token_id, *several]
    return list(dict.fromkeys(token for token in ids if token is not None))


def find_folder(model: str) -> Path:
    """A folder as it is; anything else is a Hub id and is fetched."""
    if Path(model).is_dir():
        return Path(model)
    if model.startswith((".", "/")) or model.count("/") != 1:
        raise ValueError(f"no such model: {model!r} is neither a folder nor a Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model))
    except Exception as error:  # offline, unknown, private: the hub's client raises many kinds
        raise ValueError(f"no such model: {model!r} is no folder here, and the Hub says: {error}") from error


def newest_stage(root: Path) -> Path | None:
    """The stage under `root` that finished last."""
    finished = sorted(root.rglob(FINISHED), key=lambda path: path.stat().st_mtime)
    return finished[-1].parent if finished else None
