"""Four ways to train the same model on the same samples, step by step.

Enters: a folder by `peers_drawn`. Leaves: of each step the loss and its supervised tokens. All run in float32 on one
thread, load in the process that trains, and step torch's AdamW behind a clipped gradient; the encoder is frozen, LLM
and connector train whole.

- `ours`: `recipes/finetune.py`, as a user starts it
- `bare`: a loop of twenty lines around the same model, rows and loss, and nothing else
- `trainer`: transformers' `Trainer` with a padding collator, on our export
- `trl`: TRL's `SFTTrainer` with its own collator, on our export; it refuses to pack what has pictures

The last two get the samples of each batch from `batches.json`, and otherwise do what they do.
"""

from __future__ import annotations

import json
import runpy
import sys
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.peers_drawn import ACCUMULATION, MAX_GRAD_NORM, RATE, ROWS

FINETUNE = Path(__file__).parents[1] / "finetune.py"
Told: TypeAlias = "list[tuple[float, int]]"
"""Of each step the loss, and the supervised tokens that it is the mean of."""
ROLES = {"human": "user", "gpt": "assistant"}


def ours(folder: Path) -> Told:
    """The recipe, with its metrics, guard and checks; without its watch, for which waiting would be a hang."""
    from mllm.train import metrics

    # a picture (0.1 s) follows each half minute by the clock on the wall, and here nearly all of that is waiting
    metrics.REDRAW_SECONDS = float("inf")
    sys.argv = [str(FINETUNE), "--config", str(folder / "finetune.yaml")]
    runpy.run_path(str(FINETUNE), run_name="__main__")
    lines = [json.loads(line) for line in (folder / "ours/metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["supervised_tokens"]) for line in lines]


def bare(folder: Path) -> Told:
    """The same rows from the same loader."""
    import torch
    from torch.nn.functional import cross_entropy

    from mllm.assembly import build_processor
    from mllm.config import load_config
    from mllm.data.index import build_index
    from mllm.data.loader import PlannedBatches, Share, batches
    from mllm.models.build import build_model
    from mllm.train.route import make_plan
    from mllm.train.stage_folder import load_stage

    config = load_config(folder / "finetune.yaml")
    data, processor = config.data, build_processor(config)
    index = build_index(data.sources, processor, data.seq_length, 0, data.index_dir, False)
    plan = make_plan(index, data, config.train)
    model = build_model(config.parts(), processor.image_token_id)
    load_stage(model, folder / "start")
    trained = [*model.connector.requires_grad_(True).parameters(), *model.llm.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    rows = PlannedBatches(index, plan, processor, Share(0, 1, ROWS))
    micro_batches, told = batches(rows, 0, config.train.steps or 0, 0), []
    while step := list(islice(micro_batches, ACCUMULATION)):
        said = [batch["labels"][:, 1:] != -100 for batch in step]
        total, loss = sum(int(each.sum()) for each in said), 0.0
        for batch, where in zip(step, said, strict=True):
            states = model(batch["input_ids"], batch["position_ids"], batch["pixel_values"], batch["num_images"])
            logits = model.logits(states[:, :-1][where])
            part = cross_entropy(logits, batch["labels"][:, 1:][where], reduction="sum") / total
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        told.append((loss, total))
    return told


def trainer(folder: Path) -> Told:
    """Batches padded to their longest; pictures are opened and words tokenised as they come, by Llava's processor."""
    from transformers import Trainer, TrainingArguments

    model, processor, batches = stock(folder)
    records = [asked(record, folder) for record in read(folder)]

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        from PIL import Image

        batch = processor.apply_chat_template(
            [with_parts(sample, [Image.open(path) for path in sample["images"]]) for sample in samples],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
        )
        batch["labels"] = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
        return batch

    arguments = TrainingArguments(**usual(folder / "trainer", batches), remove_unused_columns=False)
    return run(Trainer, batches, model=model, args=arguments, train_dataset=records, data_collator=collate)


def trl(folder: Path) -> Told:
    """With its documented settings for conversations about pictures. Its defaults that cost time are off (gradient
    checkpointing), or of another precision than the others (bfloat16)."""
    from datasets import Dataset, Image, List
    from trl import SFTConfig, SFTTrainer

    model, processor, batches = stock(folder)
    records = Dataset.from_list([asked(record, folder) for record in read(folder)])
    records = records.cast_column("images", List(Image()))
    settings = {"assistant_only_loss": True, "max_length": None, "gradient_checkpointing": False, "bf16": False}
    arguments = SFTConfig(**usual(folder / "trl", batches), **settings)
    return run(SFTTrainer, batches, model=model, args=arguments, train_dataset=records, processing_class=processor)


def stock(folder: Path) -> tuple[Any, Any, list[list[int]]]:
    """Our export as transformers reads it, its processor, and of each batch the places of its samples."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava", attn_implementation="sdpa")
    model.model.vision_tower.requires_grad_(False)
    model.config.text_config.use_cache = False  # nothing is generated: a cache would only be filled
    batches = json.loads((folder / "batches.json").read_text())
    return model, AutoProcessor.from_pretrained(folder / "llava"), batches


def read(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "data.json").read_text())


def asked(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A record of LLaVA as transformers and TRL want it: messages, and files of pictures beside them."""
    said = [
        {"role": ROLES[turn["from"]], "content": turn["value"].removeprefix("<image>\n")}
        for turn in record["conversations"]
    ]
    return {"messages": said, "images": [str(folder / record["image"])] if "image" in record else []}


def with_parts(sample: dict[str, Any], pictures: list[Any]) -> list[dict[str, Any]]:
    """Messages in content parts, the pictures in front of the first question."""
    shown: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    messages = []
    for message in sample["messages"]:
        messages.append({**message, "content": [*shown, {"type": "text", "text": message["content"]}]})
        shown = []
    return messages


def usual(output_dir: Path, batches: list[list[int]]) -> dict[str, Any]:
    """What both trainers are told."""
    pace = {"learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": MAX_GRAD_NORM}
    size = {"gradient_accumulation_steps": ACCUMULATION, "max_steps": len(batches) // ACCUMULATION}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return {"output_dir": str(output_dir), "optim": "adamw_torch", "use_cpu": True, **pace, **size, **quiet}


def run(kind: Any, batches: list[list[int]], **arguments: Any) -> Told:
    """Train with the samples of the batches; the loss of each step. Both methods are those that the documentation names
    for subclasses."""
    from torch.utils.data import DataLoader

    told: list[tuple[Any, Any]] = []

    class Planned(kind):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

        def training_step(self, model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
            said = (inputs["labels"] != -100).sum()
            told.append((super().training_step(model, inputs, *more, **options), said))
            return told[-1][0]

    Planned(**arguments).train()
    steps = [told[first : first + ACCUMULATION] for first in range(0, len(told), ACCUMULATION)]
    return [(sum(float(loss) for loss, _ in step), sum(int(said) for _, said in step)) for step in steps]


WAYS = {"ours": ours, "bare": bare, "trainer": trainer, "trl": trl}
