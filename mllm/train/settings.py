"""How a stage trains: one object, of which every room of this folder reads what concerns it.

Enters: the `train` section of a YAML. Leaves: checked settings; what an option does is told where it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from mllm.schema import Fraction, NotNegative, NotNegativeInt, Passes, Positive, Rate, Schema
from mllm.train.audit import AuditMode
from mllm.train.guard import GuardConfig
from mllm.train.losses import Reduction
from mllm.train.optimizer import OptimizerName
from mllm.train.saving.retention import KEEP
from mllm.train.schedule import Schedule
from mllm.train.trainable import LearningRates
from mllm.train.tuning.adapters import Lora
from mllm.train.tuning.checkpointing import Checkpointing

TrackerName = Literal["tensorboard", "wandb", "trackio"]
Trackers = Annotated[
    list[TrackerName], BeforeValidator(lambda given: given.split(",") if isinstance(given, str) else given)
]
"""A list, or names with commas between them."""


@dataclass
class TrainConfig(Schema):
    """How long, how fast, in which portions."""

    output_dir: Path
    """The stage folder that is written."""
    learning_rate: LearningRates = field(default_factory=LearningRates)
    """What trains, and its peak rate; a part without a rate is frozen."""
    lora: Lora | None = None
    """Adapters on the LLM instead of training it whole."""
    vision_lora: Lora | None = None
    """Adapters on the vision encoder instead of training it whole."""
    epochs: Passes = 1.0
    """Passes over the data."""
    steps: Positive | None = None
    """Optimiser steps; overrides `epochs`."""
    rows_per_step: Positive = 8
    """Rows of one optimiser step over all ranks and accumulation steps: the global batch."""
    rows_per_micro_batch: Positive = 1
    """Rows that one rank computes at a time. Changes memory and speed, never the result."""
    loss_reduction: Reduction = "token"
    """What counts alike: every supervised token (`token`), every sample (`sample`), or their middle (`sqrt`)."""
    warmup: Fraction = 0.03
    """Share of the steps over which the rate rises from zero."""
    schedule: Schedule = "cosine"
    optimizer: OptimizerName = "adamw"
    """`muon`: Muon for matrices, AdamW for vectors; learns small models from scratch in far fewer steps."""
    weight_decay: Rate = 0.0
    max_grad_norm: NotNegative = 1.0
    """Longer gradients are scaled down to this; 0 leaves them as they are."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Of the computation; what trains is kept in float32."""
    gradient_checkpointing: Checkpointing = False
    """Recompute layers in the backward pass: less memory, up to a third slower. `true`: those of the LLM; or a list of
    `llm`, `connector`, `vision_encoder`."""
    fp8: bool = False
    """Multiply the LLM's frozen weights as 8-bit floats, which a Hopper GPU does nearly twice as fast: for a frozen
    LLM, or the base of `lora`. With `probe` the first rows are computed both ways; where two gradients have a cosine
    under 0.99, or losses are 0.1 % apart, products of early blocks stay as the weights are, as many as it takes. A run
    that none of it helps ends; one that is resumed goes on as it began."""
    compile: bool = False
    """Compile each block of the LLM and of the encoder (torch.compile): faster on GPUs, after a minute at the start.
    Rows are filled up to `data.seq_length`, so that nothing is compiled twice. Same losses but for rounding."""
    encoder_batch: Positive | Literal["auto", False] | None = "auto"
    """Images that go through the encoder at a time. `auto`: where it is frozen and a step has several micro-batches, so
    many of the step as are quick, else those of a micro-batch. A number: as many, over the micro-batches of a step if
    it is frozen, and filled up with blank ones. `off`: those of a micro-batch."""
    feature_cache: NotNegative = 0
    """Gigabytes of memory for features of the frozen encoder, which then sees each image once; 0 keeps none."""
    feature_cache_dir: Path | None = None
    """A folder that keeps features of the frozen encoder over epochs and runs, in the place of `feature_cache`. One
    folder belongs to one encoder with its layers, image processor, precision and the connector's pooling; another run
    is refused there."""
    feature_cache_dir_gigabytes: NotNegative = 100
    """What the folder may hold; later images are encoded each time."""
    eval_every: Positive | None = None
    """Steps between held-out losses (`data.held_out`); where it is not set, once at the end."""
    log_every: Positive | None = None
    """Steps between lines on the screen; `metrics.jsonl` has every step. Where it is not set: every step in a log file,
    and in a terminal those with a held-out loss alone, since the bar shows the newest."""
    trackers: Trackers = field(default_factory=list)
    """Where the numbers of each step go as well: `tensorboard` (into the stage folder), `wandb`, `trackio`."""
    project: str = "mllm"
    """The project under which trackers file the run."""
    run_name: str = ""
    """The name of the run in `wandb` and `trackio`; where it is not set, the last two parts of `output_dir`."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What happens where a loss or gradient is not finite, or a loss leaps."""
    probe: bool = True
    """Before the first step, compute the largest micro-batch once: what does not fit fails there, and the time of a
    step is known. Changes no result."""
    hang_seconds: NotNegative = 45.0
    """Seconds without a step after which a run says which rank it waits for, at which step, and with which samples; 0
    does not watch. Five times as long in what may last: checkpoints, evaluations, a first step that compiles."""
    hang_stop_seconds: NotNegative = 600.0
    """Seconds after which it ends."""
    save_every: Positive | None = None
    """Steps between checkpoints; where it is not set, one is written only if the run is told to go (SIGTERM)."""
    keep_last: Positive = KEEP
    """Newest checkpoints that are kept."""
    keep_best: NotNegativeInt = 0
    """Checkpoints that are kept as well, however old: those of the lowest held-out loss, or, where nothing is held out,
    of the lowest training loss over their last 50 steps."""
    audit: AuditMode = "full"
    """At the first checkpoint and at the end: did what trains move, and nothing else; does the written stage say what
    the model in memory says. `full` reads it back in a fresh process (seconds), `quick` in this one."""
    seed: int = 0

    @property
    def keeps_features(self) -> bool:
        """In memory or in a folder."""
        return bool(self.feature_cache or self.feature_cache_dir)

    def __post_init__(self) -> None:
        if self.gradient_checkpointing == []:  # the flag without a value, as tyro reads it; a YAML's is refused
            self.gradient_checkpointing = True
