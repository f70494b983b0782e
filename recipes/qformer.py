"""Stage 0, optional: a Q-Former learns by itself from image-text pairs (BLIP-2's ITC, ITM and ITG); no LLM runs.

    accelerate launch recipes/qformer.py --config recipes/tiny/qformer.yaml

Enters: a YAML and flags. Leaves: a stage folder, from which `recipes/pretrain.py` starts (`init_from`).
"""

from mllm.assembly import build, build_processor, inherit, plan_run, read_data
from mllm.config import parse
from mllm.pairs import check_pairs, check_settings, choose_pairs, put_aside
from mllm.stage import close_stage, open_stage, start, user_errors
from mllm.train.blip2.objective import Blip2
from mllm.train.loop import fit


def main() -> None:
    config = parse()
    accelerator = start(config)

    processor = build_processor(config)
    check_settings(accelerator, config, processor)
    model = build(accelerator, config, processor)
    inherit(accelerator, config, model)
    choose_pairs(config, model)

    index = read_data(accelerator, config, processor)
    plan = plan_run(config, index)
    check_pairs(accelerator, config, model, processor, index, plan)
    if config.dry_run:
        return

    open_stage(accelerator, config, index)
    fit(accelerator, model, processor, index, plan, config.data, config.train, config.resume, learns=Blip2)
    put_aside(accelerator, config, model)
    close_stage(accelerator, config, model, processor)


if __name__ == "__main__":
    with user_errors():
        main()
