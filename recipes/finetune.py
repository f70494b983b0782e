"""Stage 2, instruct: conversations about images; the connector goes on, the LLM joins it, by LoRA or whole.

    accelerate launch recipes/finetune.py --config recipes/tiny/finetune.yaml

Enters: a YAML whose `init_from` names a finished stage, and flags. Leaves: a stage folder that chats.
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
