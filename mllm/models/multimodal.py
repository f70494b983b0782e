"""A vision encoder, a connector and a causal LLM as one model.

Enters: tokens with placeholders [B, S], their positions [B, S], images [N, 3, H, W]. Leaves: the LLM's last hidden
states [B, S, D]; what they mean (a loss, the next token) is the business of who asked.

Packed rows are isolated by their positions alone: no attention mask and no cache is how transformers recognises that
a row holds several samples. An all-ones mask or a cache would let them see each other without any error. For kernels
that are told where each sample begins, that is derived from the same positions (`packed/boundaries.py`).

B rows, S tokens of a row, N images or tiles, P patches, V visual tokens of each, T of all that are laid out as images
of any resolution (`image_newline.py`), Dv D widths of encoder and LLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.models.feature_cache import FeatureCache
from mllm.models.fused_encoder import FusedEncoder
from mllm.models.head import scaled
from mllm.models.image_groups import Groups, filled_up, in_groups
from mllm.models.image_newline import ImageNewline
from mllm.models.packed.boundaries import Boundaries
from mllm.models.packed.choice import packed_mask
from mllm.models.splice import splice
from mllm.models.stored_features import StoredFeatures
from mllm.models.vision_encoder import VisionEncoder
from mllm.native_aspect import NativeAspect


class MultimodalLM(nn.Module):
    """Give it its parts; tests hand in tiny ones."""

    def __init__(
        self,
        vision_encoder: VisionEncoder | FusedEncoder,
        connector: nn.Module,
        llm: Any,
        image_token_id: int,
        image_newline: ImageNewline | None = None,
    ) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.connector = connector
        self.image_newline = image_newline
        self.native_aspect: NativeAspect | None = None
        """How images are read that keep their aspect; `build_model` sets it."""
        self.llm: Any = llm
        self.image_token_id = image_token_id
        self.feature_cache: FeatureCache | StoredFeatures | None = None
        """Where features of a frozen encoder are kept, if the run wants it; only training sets it."""
        self.encoder_batch: Groups | None = None
        """How many images go through the encoder at a time; None takes them as they come. Only training sets it."""
        self.fewest_images = 1
        """As many images see the encoder at least; one that is compiled for any number of them wants two."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor,
        num_images: int,
        instruction_ids: Tensor | None = None,
        slots: Tensor | None = None,
        samples: Boundaries | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """[B, S], [B, S], [max(N, 1), 3, H, W] or features [max(N, 1), P, Dv], [N, words] -> hidden states [B, S, D].

        What the host knows already, a device need not be asked: the places of the placeholders in all rows, `slots`
        [T], and the boundaries of the samples.

        Raises:
            ValueError: placeholders and visual tokens differ in number.
        """
        visual_tokens = self.visual_tokens(pixel_values, instruction_ids, image_sizes)
        embeddings = self.embed(input_ids, visual_tokens, num_images, slots)  # [B, S, D]
        mask = packed_mask(self.llm, embeddings, position_ids, samples)
        decoder = self.llm.get_decoder()
        options = {"attention_mask": mask, "position_ids": position_ids, "use_cache": False}
        return decoder(inputs_embeds=embeddings, **options).last_hidden_state

    def visual_tokens(
        self,
        pixel_values: Tensor,
        instruction_ids: Tensor | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """[N, 3, H, W] -> [N, V, D], through encoder and connector; or [T, D] of images of these heights and widths,
        where their tokens follow from them."""
        grids = [self.native_aspect.patches(w, h) for h, w in image_sizes or ()] if self.native_aspect else []
        tokens = self.connected(pixel_values, instruction_ids, grids)  # [N, V, D]
        if grids:
            return torch.cat([own[: rows * columns] for own, (rows, columns) in zip(tokens, grids, strict=True)])
        return tokens if self.image_newline is None else self.image_newline(tokens, image_sizes)

    def connected(
        self, pixel_values: Tensor, instruction_ids: Tensor | None, grids: Sequence[tuple[int, int]] = ()
    ) -> Tensor:
        """[N, 3, H, W] -> [N, V, D]; instructions [N, words] for a connector that reads them; `grids` of images that
        keep their aspect, whose tokens are the first of V."""
        features = self.vision_encoder(pixel_values, grids) if grids else self.features(pixel_values)  # [N, P, Dv]
        features = features.to(next(self.connector.parameters()).dtype)
        if not getattr(self.connector, "instruct", False):
            return self.connector(features)  # [N, V, D]
        if instruction_ids is None:  # looked up all the same: every rank takes part in what gathers the table
            instruction_ids = torch.full((len(features), 1), -1, device=features.device)
        words = self.llm.get_input_embeddings()(instruction_ids.clamp(min=0))  # [N, words, D]
        return self.connector(features, words.to(features.dtype), instruction_ids >= 0)  # [N, V, D]

    def features(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] -> patch features [N, P, Dv], from the encoder or as it once gave them, then perhaps pooled.
        What has three dimensions is features already."""
        if pixel_values.ndim == 3:
            return pixel_values
        if self.feature_cache:
            return self.feature_cache(self.kept, pixel_values)
        if self.encoder_batch and self.encoder_batch.filled:
            return in_groups(self.vision_encoder, pixel_values, self.encoder_batch.size)
        if len(pixel_values) < self.fewest_images:
            return filled_up(self.vision_encoder, pixel_values, self.fewest_images)
        return self.vision_encoder(pixel_values)

    def kept(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] -> what a cache holds of images: their features, pooled where the connector begins so."""
        return self.pooled(self.vision_encoder(pixel_values))

    def pooled(self, features: Tensor) -> Tensor:
        """[N, P, Dv] -> [N, T, Dv] where the connector makes them fewer before its first weight, else as they are. The
        connector says the same of both: under autocast its first product would round them just so."""
        pool = getattr(self.connector, "pooled", None)
        if pool is None:
            return features
        fewer: Tensor = pool(features.to(next(self.connector.parameters()).dtype))  # [N, T, Dv]
        kind = fewer.device.type
        if fewer.shape[1] == features.shape[1]:
            return features
        return fewer.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else fewer

    def embed(self, input_ids: Tensor, visual_tokens: Tensor, num_images: int, slots: Tensor | None = None) -> Tensor:
        """Token embeddings with the visual tokens in their slots [B, S, D].

        Without images `visual_tokens` come of a blank one; they are added with weight zero, so that every rank runs
        encoder and connector, forward and backward, in every micro-batch (collectives hang otherwise).
        """
        is_placeholder = input_ids == self.image_token_id  # [B, S]
        # the placeholder needs no row of its own in the embedding table: what is looked up for it is overwritten
        embeddings = self.llm.get_input_embeddings()(input_ids.masked_fill(is_placeholder, 0))  # [B, S, D]
        places = is_placeholder if slots is None else slots
        if num_images == 0:
            return splice(embeddings, places, visual_tokens[:0]) + 0.0 * visual_tokens.sum().to(embeddings.dtype)
        return splice(embeddings, places, visual_tokens)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., vocabulary]: the LLM's head with the scale or cap that its family puts behind it."""
        return scaled(self.llm.get_output_embeddings()(hidden_states), self.llm.config)
