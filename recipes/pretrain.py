"""Stage 1, align: image-text pairs teach the connector to speak the LLM's language; encoder and LLM stay frozen.

    accelerate launch recipes/pretrain.py --config recipes/tiny/pretrain.yaml

Enters: a YAML and flags. Leaves: a stage folder, from which `recipes/finetune.py` starts.
"""

from mllm import prospect
from mllm.assembly import build, build_processor, inherit, plan_run, read_data
from mllm.config import parse
from mllm.stage import check_run, close_stage, open_stage, start, user_errors
from mllm.train.loop import fit
from mllm.train.trainable import choose_trainable


def main() -> None:
    config = parse()
    accelerator = start(config)

    processor = build_processor(config)
    model = build(accelerator, config, processor)
    inherit(accelerator, config, model)
    choose_trainable(model, config.train.learning_rate, config.train.lora, config.train.vision_lora)
    prospect.tell(accelerator, config, model)

    index = read_data(accelerator, config, processor)
    plan = plan_run(config, index)
    check_run(accelerator, config, model, processor, index, plan)
    if config.dry_run:
        return

    open_stage(accelerator, config, index)
    fit(accelerator, model, processor, index, plan, config.data, config.train, config.resume)
    close_stage(accelerator, config, model, processor)


if __name__ == "__main__":
    with user_errors():
        main()
