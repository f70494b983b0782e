"""BLIP-2's three losses on image-text pairs (Li et al. 2023, section 3.1), with equal weights.

Enters: a micro-batch of rows, each one image and what the assistant says of it. Leaves: the sum over its pairs of

- ITC, contrast: of all texts the own one, of all images the own one; queries and text do not see each other;
- ITM, matching: is this text of this image, asked of the pair, of a hard negative image and of a hard negative text;
  queries and text see each other;
- ITG, generation: the caption word by word; text sees queries and earlier text, queries do not see text.

Images and texts of all ranks are negatives, gathered with their gradients: the pairs that see each other are those of
rows_per_micro_batch x ranks rows, and two ranks of 2 rows learn what one of 4 does. What is accumulated is apart.

B rows of this rank, G of all, P patches, Q queries, T words, K supervised tokens, Dv H D widths of encoder,
Q-Former and LLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad

from mllm.models.multimodal import MultimodalLM
from mllm.train.blip2.contrast import contrast, hard_negatives, similarities
from mllm.train.blip2.gather import gather, own_rows
from mllm.train.blip2.same_image import digests
from mllm.train.blip2.text_side import WORDS, embedded, mask_of, through_blocks
from mllm.train.head_loss import head_loss
from mllm.train.losses import NextToken, Reduction, Supervision, supervision
from mllm.train.sums import global_sums

if TYPE_CHECKING:
    from accelerate import Accelerator

READS, WRITES = 0, 1
"""Which start stands before the words."""


class Blip2(NextToken):
    """The model and the three losses, in the place of `NextToken`. Its connector has a `text_side`."""

    joint = True

    def __init__(self, model: MultimodalLM) -> None:
        super().__init__(model)
        self.summed: list[Tensor] = []
        """ITC, ITM, ITG and pairs of each micro-batch since they were last told."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor,
        num_images: int,
        reduction: Reduction = "sample",
        each: bool = False,
        instruction_ids: Tensor | None = None,
        chosen: Supervision | None = None,
        upstream: float = 1.0,
        **known: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `NextToken.forward`: the sum over the pairs, float32, and with `each` the loss of each word [K] of ITG."""
        at, targets, weight = chosen or supervision(labels, position_ids, "sample")
        row, column = placed(at, labels)
        features, has_image = self.features(input_ids, pixel_values, num_images)  # [B, P, Dv], [B]
        ids = input_ids.new_full((len(labels), WORDS), -1).index_put((row, column), targets)
        self.check(has_image, ids)
        image = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        image[has_image] = digests(pixel_values[:num_images])
        # what all ranks must know alike: what is drawn, who is a pair, which image it has, and how many words the
        # longest caption has
        facts = torch.cat([seed(ids), has_image[:, None].long(), image[:, None], ids], dim=1)  # [B, 3 + WORDS]
        facts = gather(facts) if self.training else facts  # [G, 3 + WORDS]
        longest = max(1, int((facts[:, 3:] >= 0).sum(1).max()))
        ids, all_ids = ids[:, :longest], facts[:, 3 : 3 + longest]

        words = self.words(ids)  # [B, T, D]
        queries, states = self.generated(features, words, ids >= 0)
        itg, losses = head_loss(self.model, self.side.to_words(states[row, column]), targets, weight, upstream)
        if not self.training:  # held-out samples: words alone are asked, and ranks may have unlike rows
            return (itg, losses) if each else itg

        own, counts = own_rows(len(ids), ids.device), (facts[:, 1] > 0) & (all_ids[:, 0] >= 0)  # a hole is no pair
        same = (ids[:, None] == all_ids[None]).all(dim=2) | (image[:, None] == facts[None, :, 2])  # [B, G]
        to_texts, to_images = self.compared(queries, self.read(words, ids >= 0))  # [B, G] each
        itc = (contrast(to_texts, same, counts) + contrast(to_images, same, counts)) / 2

        noise = uniform(int(facts[0, 0]), len(all_ids)).to(ids.device)[:, own]  # [2, B, G]
        text, found = hard_negatives(to_texts, same, counts, noise[0])
        other, _ = hard_negatives(to_images, same, counts, noise[1])
        itm = self.matched(features, gather(features.detach()), ids, all_ids, other, text, found)

        pairs = counts[own].float()
        sums = torch.stack([(itc * pairs).sum(), (itm * pairs).sum(), itg.float()])
        self.summed.append(torch.cat([sums.detach(), pairs.sum()[None]]))
        return (sums.sum(), losses) if each else sums.sum()

    @property
    def qformer(self) -> Any:
        """The connector, with its text side on."""
        return self.model.connector

    @property
    def side(self) -> Any:
        return self.qformer.text_side

    def features(self, input_ids: Tensor, pixel_values: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
        """Of each row the patches of its image [B, P, Dv], zeros where it has none, and whether it has one [B]."""
        with torch.no_grad():
            found = self.model.features(pixel_values).to(self.qformer.queries.dtype)
        has_image = (input_ids == self.model.image_token_id).any(dim=1)
        if int(has_image.sum()) != num_images:
            raise ValueError(f"{num_images} images in {int(has_image.sum())} rows that have one: a pair has one image")
        features = found.new_zeros(len(input_ids), *found.shape[1:])
        features[has_image] = found[:num_images]
        return features, has_image

    def check(self, has_image: Tensor, ids: Tensor) -> None:
        if (~has_image & (ids[:, 0] >= 0)).any():
            raise ValueError("words without an image: the losses of pairs need samples of one image and a caption")

    def words(self, ids: Tensor) -> Tensor:
        """[N, T] -> [N, T, D], of the frozen table."""
        embeddings = self.model.llm.get_input_embeddings()(ids.clamp(min=0))
        return embeddings.to(self.qformer.queries.dtype)

    def generated(self, features: Tensor, words: Tensor, is_word: Tensor) -> tuple[Tensor, Tensor]:
        """Queries that saw the image alone [B, Q, H]; at each place the state that says its word [B, T, H]."""
        text = embedded(self.qformer, words, WRITES)[:, :-1]  # a word is said one place before it is read
        mask = mask_of(shown(is_word)[:, :-1], self.qformer.queries.shape[1], writes=True)
        return through_blocks(self.qformer, text, mask, features)

    def read(self, words: Tensor, is_word: Tensor) -> Tensor:
        """The start's state behind text that saw no image [B, H]."""
        text, mask = embedded(self.qformer, words, READS), mask_of(shown(is_word), 0, writes=False)
        return through_blocks(self.qformer, text, mask, None)[1][:, 0]

    def compared(self, queries: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """[B, Q, H], [B, H] -> own images to all texts [B, G], own texts to all images [B, G], over the temperature."""
        seen = normalize(self.side.of_query(queries).float(), dim=-1)  # [B, Q, E]
        said = normalize(self.side.of_text(text).float(), dim=-1)  # [B, E]
        of_images, of_texts = similarities(seen, gather(said)), similarities(gather(seen), said).t()
        return of_images / self.side.temperature, of_texts / self.side.temperature

    def matched(
        self,
        features: Tensor,
        all_features: Tensor,
        ids: Tensor,
        all_ids: Tensor,
        image: Tensor,
        text: Tensor,
        found: Tensor,
    ) -> Tensor:
        """[B]: the mean over the pair, its text with a wrong image and its image with a wrong text."""
        images = torch.cat([features, all_features[image], features])  # [3B, P, Dv]
        texts = torch.cat([ids, ids, all_ids[text]])  # [3B, T]
        logits = self.match_logits(images, texts)
        is_pair = torch.arange(3, device=ids.device).repeat_interleave(len(ids)) == 0
        losses = cross_entropy(logits.float(), is_pair.long(), reduction="none").view(3, -1)  # [3, B]
        weights = torch.stack([torch.ones_like(found), found, found]).float()
        return (losses * weights).sum(0) / weights.sum(0)

    def match_logits(self, features: Tensor, ids: Tensor) -> Tensor:
        """[N, P, Dv], [N, T] -> [N, 2]: no pair, a pair; the mean over the queries."""
        text, number = embedded(self.qformer, self.words(ids), READS), self.qformer.queries.shape[1]
        queries, _ = through_blocks(self.qformer, text, mask_of(shown(ids >= 0), number, writes=False), features)
        return self.side.matches(queries).mean(dim=1)


def placed(at: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each supervised token [K] its row, and its place among the supervised tokens of that row."""
    row = at // labels.shape[1]
    before = row.bincount(minlength=len(labels)).cumsum(0).roll(1)
    before[0] = 0
    column = torch.arange(len(row), device=row.device) - before[row]
    if len(column) and int(column.max()) >= WORDS:
        raise ValueError(f"a caption of {int(column.max()) + 1} tokens, {WORDS} are read: lower data.seq_length")
    return row, column


def shown(is_word: Tensor) -> Tensor:
    """[N, T] -> [N, 1 + T]: with the start."""
    return pad(is_word, (1, 0), value=True)


def seed(ids: Tensor) -> Tensor:
    """A number to draw from [B, 1] int64; that of the first rank is used by all."""
    return torch.randint(2**31, (1, 1)).to(ids.device).expand(len(ids), 1)


def uniform(number: int, rows: int) -> Tensor:
    """[2, G, G], the same on every rank and every device."""
    return torch.rand(2, rows, rows, generator=torch.Generator().manual_seed(number))


def told(accelerator: Accelerator, objective: nn.Module, numbers: dict[str, Any]) -> dict[str, Any]:
    """The line of a step with the mean of each loss over its pairs; as it was where another objective learns. Without
    `mfu`, which counts what the LLM would compute."""
    losses = next((module for module in objective.modules() if isinstance(module, Blip2)), None)
    if losses is None:
        return numbers
    sums = torch.stack(losses.summed).double().sum(0).tolist()
    losses.summed = []
    itc, itm, itg, pairs = global_sums(accelerator, sums)
    of_pairs = {name: value / max(1.0, pairs) for name, value in (("itc", itc), ("itm", itm), ("itg", itg))}
    return {**{name: value for name, value in numbers.items() if name != "mfu"}, **of_pairs}
