"""The config of a vision encoder, a connector and a causal LLM in one `config.json`.

Enters: the fields of that file. Leaves: an `MllmConfig`, for transformers 4.57 and 5.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class MllmConfig(PretrainedConfig):
    """`vision_config` and `text_config` are those of the parts, `connector` is the settings of the connector."""

    model_type = "mllm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        connector: dict[str, Any] | None = None,
        image_token_id: int = 0,
        feature_layer: int | list[int] = -2,
        feature_norm: bool = False,
        grids: list[dict[str, int]] | None = None,
        normalisations: list[dict[str, Any]] | None = None,
        more_vision_configs: list[Any] | None = None,
        any_resolution: dict[str, Any] | None = None,
        lm_head_bias: bool = False,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vision_config = as_config(vision_config, "clip_vision_model")
        self.text_config = as_config(text_config, "llama")
        self.connector = connector or {}
        self.image_token_id = image_token_id
        self.feature_layer = feature_layer
        self.feature_norm = feature_norm
        self.grids = grids or []
        self.normalisations = normalisations or []
        self.more_vision_configs = more_vision_configs or []
        self.any_resolution = any_resolution
        self.lm_head_bias = lm_head_bias
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)  # type: ignore[call-arg]

    def encoder_configs(self) -> list[Any]:
        """One for each vision encoder; nearly always one."""
        return [self.vision_config, *(as_config(config, "") for config in self.more_vision_configs)]


def as_config(config: Any, otherwise: str) -> Any:
    """A config object, of a dictionary too; of nothing the default of a model type."""
    if isinstance(config, dict):
        return AutoConfig.for_model(**config)
    return AutoConfig.for_model(otherwise) if config is None else config
