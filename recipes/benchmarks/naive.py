"""The way that is measured beside: LLaVA's training step as most people write it in plain PyTorch.

Enters: the same parts and the same samples. Leaves: a loop without end, step by step. Sixteen samples a batch, padded
on the right to the longest; pixels normalised by the workers and sent as float32; the LLM's own loss, which makes
float32 logits at every position; `loss.item()` in each step; activation checkpointing where asked for.

B samples, S tokens of the longest, V visual tokens, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from benchmarks.drawn_training import DrawnIndex, DrawnProcessor
from mllm.models.multimodal import MultimodalLM
from mllm.types import IGNORE_INDEX, Normalisation

BATCH = 16
Batch = dict[str, Tensor]


class NaiveLlava(nn.Module):
    """Encoder, projector and LLM called one after the other, the LLM with its labels."""

    def __init__(self, model: MultimodalLM) -> None:
        super().__init__()
        self.vision_encoder, self.connector, self.llm = model.vision_encoder, model.connector, model.llm
        self.image_token_id = model.image_token_id

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        """[B, S] three times, [N, 3, H, W] float32 -> the mean loss."""
        visual = self.connector(self.vision_encoder(pixel_values).to(next(self.connector.parameters()).dtype))
        is_image = input_ids == self.image_token_id  # [B, S]
        embeddings = self.llm.get_input_embeddings()(input_ids.masked_fill(is_image, 0))  # [B, S, D]
        embeddings = embeddings.masked_scatter(is_image[..., None], visual.to(embeddings.dtype))
        answer = self.llm(
            inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, use_cache=False
        )  # float32 logits [B, S, vocabulary]
        return answer.loss  # type: ignore[no-any-return]


class Samples(Dataset[dict[str, Any]]):
    """One sample an item, pixels normalised."""

    def __init__(self, index: DrawnIndex, processor: DrawnProcessor, normalisation: Normalisation) -> None:
        self.index, self.processor, self.normalisation = index, processor, normalisation

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = self.index.sample(number)
        input_ids, labels = self.processor.tokens(sample)
        pixels = self.normalisation(self.processor.pixels(sample.images))
        return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels), "pixel_values": pixels}


def padded(samples: Sequence[dict[str, Any]]) -> Batch:
    """Samples of any length -> [B, S]."""
    tokens = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "labels": pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in tokens], batch_first=True),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
    }


def order(samples: int, batch: int) -> Iterator[list[int]]:
    """Numbers of the samples of each batch, shuffled, epoch after epoch."""
    epoch = 0
    while True:
        shuffled = torch.randperm(samples, generator=torch.Generator().manual_seed(epoch)).tolist()
        yield from (shuffled[start : start + batch] for start in range(0, samples - batch + 1, batch))
        epoch += 1


GOLDEN = (5**0.5 - 1) / 2


def spread(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    """The batches of `order`, each epoch rearranged, so that any few of them in a row stand for all: by the length to
    which they are padded they come as the multiples of the golden ratio fall on a circle. The longest is the first, as
    in loops that want to know early whether memory suffices."""
    shuffled, number = order(len(lengths), batch), len(lengths) // batch
    while True:
        epoch = [next(shuffled) for _ in range(number)]
        by_length = sorted(epoch, key=lambda numbers: max(lengths[sample] for sample in numbers))
        places = [1 - step * GOLDEN % 1 for step in range(number)]  # in (0, 1], of the longest 1
        ranks = {step: rank for rank, step in enumerate(sorted(range(number), key=places.__getitem__))}
        yield from (by_length[ranks[step]] for step in range(number))


def loop(
    llava: NaiveLlava, batches: Iterator[Batch], device: torch.device, rate: float, bf16: bool = True
) -> Iterator[None]:
    """A step each."""
    trained = [parameter for parameter in llava.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for batch in batches:
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = llava(**inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        yield


def read(
    samples: Samples, batch: int = BATCH, workers: int = 4, numbers: Iterator[list[int]] | None = None
) -> Iterator[Batch]:
    """Padded batches, shuffled or of these numbers, without end."""
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=numbers or order(len(samples), batch),  # type: ignore[arg-type]
        collate_fn=padded,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
