"""A vision encoder, a connector and a causal LLM as one model of transformers, 4.57 and 5.

Enters: input_ids [B, S] in which each image has V placeholders, pixel_values [N, 3, H, W]; or as many placeholders as
LlavaNextProcessor counts for an image of any size, its tiles [N, most tiles, 3, H, W] and sizes. Leaves: logits
[B, S, vocabulary]. Names of the parts (`vision_tower`, `multi_modal_projector`, `language_model`, `lm_head`) are those
that servers look for.

B rows, S tokens of a row, N images, V visual tokens an image, T of all images, D width of the LLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from mllm.any_resolution import AnyResolution
from mllm.export.remote_code.configuration_mllm import MllmConfig
from mllm.export.remote_code.connector_of import make_connector
from mllm.models.fused_encoder import FusedEncoder
from mllm.models.head import scaled
from mllm.models.image_newline import ImageNewline
from mllm.models.vision_encoder import VisionEncoder
from mllm.models.vision_grid import Grid
from mllm.types import Normalisation


class MllmPreTrainedModel(PreTrainedModel):
    config_class = MllmConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012


class MllmModel(MllmPreTrainedModel):
    """Everything but the head."""

    def __init__(self, config: MllmConfig) -> None:
        super().__init__(config)
        self.vision_tower = make_encoder(config)
        self.language_model: Any = AutoModel.from_config(config.text_config, **attention(config.text_config))
        width = self.language_model.get_input_embeddings().embedding_dim
        self.multi_modal_projector = make_connector(
            config.connector, self.vision_tower.width, width, self.vision_tower.num_patches
        )
        self.image_newline = make_newline(config, width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Any = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """[N, 3, H, W] -> `pooler_output`, N visual tokens [V, D]; [N, most tiles, 3, H, W] and heights and widths
        [N, 2] -> as many as an image of that size has, each."""
        if self.image_newline is None:
            return BaseModelOutputWithPooling(pooler_output=list(self.connected(pixel_values)))  # type: ignore[arg-type]
        sizes = [(int(height), int(width)) for height, width in image_sizes]
        tiles = [self.image_newline.layout.num_tiles(width, height) for height, width in sizes]
        shown = torch.cat([image[:number] for image, number in zip(pixel_values, tiles, strict=True)])
        tokens = self.connected(shown).split(tiles)
        laid_out = [self.image_newline(own, [size]) for own, size in zip(tokens, sizes, strict=True)]
        return BaseModelOutputWithPooling(pooler_output=laid_out)  # type: ignore[arg-type]

    def connected(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, V, D]."""
        features = self.vision_tower(pixel_values)  # [N, P, Dv]
        tokens: Tensor = self.multi_modal_projector(features.to(next(self.multi_modal_projector.parameters()).dtype))
        return tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        image_sizes: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if inputs_embeds is None:
            assert input_ids is not None, "give input_ids or inputs_embeds"
            inputs_embeds = self.embed(input_ids, pixel_values, image_sizes)  # [B, S, D]
        kwargs["return_dict"] = True
        return self.language_model(  # type: ignore[no-any-return]
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_sizes: Any) -> Tensor:
        """Token embeddings with the visual tokens in their slots [B, S, D]."""
        is_placeholder = input_ids == self.config.image_token_id  # [B, S]
        embeddings: Tensor = self.get_input_embeddings()(input_ids)  # [B, S, D]
        if pixel_values is None:
            return embeddings
        found = self.get_image_features(pixel_values, image_sizes).pooler_output
        visual = torch.cat(found)  # type: ignore[arg-type]  # [T, D]
        if int(is_placeholder.sum()) != len(visual):
            raise ValueError(f"{int(is_placeholder.sum())} placeholders in input_ids, {len(visual)} visual tokens")
        if self.config.text_config.model_type in ("gemma", "gemma2") and not hasattr(
            self.get_input_embeddings(), "embed_scale"
        ):
            visual = visual / visual.shape[-1] ** 0.5  # 4.57 scales whatever goes in, 5 scales words alone
        return embeddings.masked_scatter(is_placeholder.unsqueeze(-1), visual.to(embeddings.dtype))


class MllmForConditionalGeneration(MllmPreTrainedModel, GenerationMixin):
    """The model with its head."""

    def __init__(self, config: MllmConfig) -> None:
        super().__init__(config)
        self.model = MllmModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(self.get_input_embeddings().embedding_dim, text.vocab_size, bias=config.lm_head_bias)
        table = self.get_input_embeddings()
        (name,) = (name for name, module in self.named_modules() if module is table)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Any = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        image_sizes: Any = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        for_loss = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
        found = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scaled(self.lm_head(found.last_hidden_state[:, kept]), self.config.text_config)  # [B, S, vocabulary]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **for_loss)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Images are seen once; from then on the cache holds what they became."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            inputs["pixel_values"] = None
        return inputs


def attention(text_config: Any) -> dict[str, Any]:
    """4.57 lets Gemma 2 run on sdpa, which leaves out the cap on its attention scores."""
    return {"attn_implementation": "eager"} if getattr(text_config, "attn_logit_softcapping", None) else {}


def make_encoder(config: MllmConfig) -> VisionEncoder | FusedEncoder:
    """The vision encoder, or several as one."""
    encoders = [
        VisionEncoder(
            AutoModel.from_config(own),
            config.feature_layer,
            as_normalisation(normalisation),
            Grid(**grid),
            config.feature_norm,
        )
        for own, grid, normalisation in zip(config.encoder_configs(), config.grids, config.normalisations, strict=True)
    ]
    return FusedEncoder(encoders) if len(encoders) > 1 else encoders[0]


def make_newline(config: MllmConfig, width: int) -> ImageNewline | None:
    """What lays tiles out as the images that they were cut from, where the model was trained so."""
    if not (settings := config.any_resolution):
        return None
    grids = tuple((columns, rows) for columns, rows in settings["grids"])
    return ImageNewline(AnyResolution(settings["side"], settings["across"], grids), width)


def as_normalisation(settings: dict[str, Any]) -> Normalisation:
    """JSON knows lists alone."""
    mean, std = (tuple(settings[name]) for name in ("mean", "std"))
    return Normalisation(settings["scale"], mean, std)  # type: ignore[arg-type]
