"""The stage in which a Q-Former learns alone, from image-text pairs: what stands around `fit`.

Enters: a `RunConfig` and its model. Leaves: a model in which the Q-Former with its text side trains, and at the end a
stage folder whose connector is that of any other stage; the text side lies beside it, for whoever asks.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mllm.config import RunConfig
from mllm.data.index import Index
from mllm.data.plan import Plan
from mllm.data.processor import Processor
from mllm.data.streams.plan import StreamPlan
from mllm.data.streams.reader import Stream
from mllm.models.connectors.qformer import QFormer, QFormerConnector
from mllm.models.multimodal import MultimodalLM
from mllm.train import engine
from mllm.train.blip2.text_side import FILE, WORDS, attach, take_off
from mllm.train.engines.shards import whole
from mllm.train.preflight import numbers, preflight
from mllm.train.route import deal, num_steps
from mllm.train.saving.tensors import save_tensors
from mllm.train.trainable import choose_trainable
from mllm.train.watching.console import console

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_settings(accelerator: Accelerator, config: RunConfig, processor: Processor) -> None:
    """Stop where a setting means nothing here, or something else.

    Raises:
        ValueError: names the setting and what to do.
    """
    train, data, rates = config.train, config.data, config.train.learning_rate
    if not isinstance(config.parts().connector, QFormerConnector):
        raise ValueError(f"model.connector.type {config.parts().connector.type}: this stage teaches a qformer")
    if data.packing:
        raise ValueError("data.packing: pairs are compared row by row, one in each: set data.packing false")
    if data.tiles != "none":
        raise ValueError(f"data.tiles {data.tiles}: a pair has one image of one tile: leave it out, until align")
    if train.loss_reduction != "sample":
        raise ValueError(f"train.loss_reduction {train.loss_reduction}: pairs count alike here: set it to sample")
    if not rates.connector or rates.llm or rates.vision_encoder or train.lora or train.vision_lora:
        raise ValueError("only the Q-Former learns here: give train.learning_rate.connector a rate, and no other part")
    together = train.rows_per_micro_batch * accelerator.num_processes
    if together < 2:
        raise ValueError("train.rows_per_micro_batch 1 on one rank: a pair is compared with others: raise it")
    longest = processor.num_visual_tokens + WORDS
    if data.seq_length > longest:
        raise ValueError(
            f"data.seq_length {data.seq_length} allows captions that the Q-Former does not read whole: set it to at "
            f"most {longest} ({processor.num_visual_tokens} visual tokens and {WORDS} words), where they are cut"
        )
    if train.compile or train.fp8:
        raise ValueError("train.compile and train.fp8 are of the LLM, which does not run here: leave them out")
    if engine.shards_weights(accelerator):
        raise ValueError("ZeRO stage 3 and FSDP2 cut up weights that this stage reads: use ZeRO stage 2 or plain DDP")


def choose_pairs(config: RunConfig, model: MultimodalLM) -> None:
    """Put the text side on and switch on all but the way to the LLM, which nobody asks here."""
    assert isinstance(model.connector, QFormer)
    attach(model.connector, model.llm.get_input_embeddings().embedding_dim)
    choose_trainable(model, config.train.learning_rate, None)
    model.connector.to_llm.requires_grad_(False)


def check_pairs(
    accelerator: Accelerator,
    config: RunConfig,
    model: MultimodalLM,
    processor: Processor,
    index: Index | Stream,
    plan: Plan | StreamPlan,
) -> None:
    """Tell the run before its first step. Memory and time are not predicted: what is known of them is of the LLM.

    Raises:
        ValueError: a sample is no pair, or rows cannot be dealt.
    """
    if isinstance(index, Index) and (odd := int((index.tiles != 1).sum())):
        raise ValueError(
            f"{odd} of {len(index.tiles)} samples have no image or several: here each is one image and what is said "
            f"of it; name a source of captions"
        )
    deal(accelerator, index, plan, processor, config.train)
    train, steps = config.train, num_steps(plan, config.train)
    screen = console(accelerator)
    known = preflight(screen, model, train.learning_rate, index, plan, processor, steps)
    together = train.rows_per_micro_batch * accelerator.num_processes
    screen.print(f"each image is compared with {together} texts: rows_per_micro_batch x ranks", highlight=False)
    if config.json and accelerator.is_main_process:
        told = numbers(model, train.learning_rate, known, plan, processor, steps)
        config.json.write_text(json.dumps(told, indent=1) + "\n")


def put_aside(accelerator: Accelerator, config: RunConfig, model: MultimodalLM) -> None:
    """Take the text side off, into a file of its own."""
    assert isinstance(model.connector, QFormer)
    is_main = accelerator.is_main_process
    taken = whole(dict(take_off(model.connector)), is_main)
    save_tensors(taken, config.train.output_dir / FILE, is_main)
    console(accelerator).print(f"{FILE}: the text side and the heads, of this stage alone", highlight=False)
