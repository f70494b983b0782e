"""Train the two tiny parts of the demo, which a real job takes from the Hub.

Enters: a folder by `data_scripts/make_tiny.py`. Leaves: `OUT/vision_encoder` (a CLIP with both towers, its image
processor and tokenizer), `OUT/llm` (a causal LM, its tokenizer with a chat template) and `OUT/parts.json` (losses,
seconds). Why: with these two, "frozen encoder + connector + LLM" means what it means at full size, offline.

The encoder learns from captions alone, the LLM from words alone: neither has seen a question about a picture. They
train side by side, one process and one core each.

    python recipes/tiny/parts.py --data runs/tiny/data --out runs/tiny/parts
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two trainings on two cores; a second thread each would only spin
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the two processes are forked

from clip import EncoderConfig, train_clip
from llm import train_llm
from mllm.data.curation.door import run
from vocabulary import train_tokenizer


def main(data: Path, out: Path, encoder: EncoderConfig = EncoderConfig(), llm_steps: int = 270) -> None:  # noqa: B008
    """Train both parts.

    Args:
        data: A folder by `data_scripts/make_tiny.py`.
        out: Where the parts go.
        encoder: Shape and training of the vision encoder.
        llm_steps: Steps of the LLM.
    """
    if not (data / "texts.jsonl").is_file():
        raise ValueError(
            f"no {data / 'texts.jsonl'}: draw the data first, python data_scripts/make_tiny.py --out {data}"
        )
    started = time.perf_counter()
    train_tokenizer(data).save_pretrained(out / "llm")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        clip = pool.submit(train_clip, data, out, encoder)
        llm = pool.submit(train_llm, data, out, llm_steps)
        reports = {"vision_encoder": clip.result(), "llm": llm.result()}
    reports["seconds"] = time.perf_counter() - started
    (out / "parts.json").write_text(json.dumps(reports, indent=1))
    print(json.dumps(reports, indent=1))


if __name__ == "__main__":
    sys.exit(run(main, None))
