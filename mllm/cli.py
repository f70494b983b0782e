"""`mllm`: what a trained model is for, as commands.

Enters: the command line. Leaves: words on the screen, or files. Each command is a typed function whose docstring is
its help; what is heavy is imported inside, so that `mllm --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mllm import __version__
from mllm.conversation import COMMANDS, Answers, Talk, question, say
from mllm.full_disk import unwritten
from mllm.quiet import quiet_libraries
from mllm.types import Video
from mllm.writable import check_file

NO_MODEL = "no model: train one (`make demo`), or give --model DIR|HUB_ID or set $MLLM_MODEL"


def chat(
    image: Annotated[list[str], tyro.conf.UseAppendAction] = [],  # noqa: B006
    video: Annotated[list[str], tyro.conf.UseAppendAction] = [],  # noqa: B006
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = "",
    model: str = "",
    max_new_tokens: int = 256,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
    compile: bool = True,
) -> None:
    """Talk about images with a trained model.

    Args:
        image: Path, URL or data URI; may be repeated.
        video: A video file, a folder of its frames, or an animated GIF; may be repeated. Seen as up to
            `data.video_frames` images, a setting of the training that the model remembers.
        prompt: Ask this, print the answer, and stop. Without it a conversation opens (piped text is one question).
        model: Stage folder, exported folder, or the Hub id of one; $MLLM_MODEL, or the newest finished run under
            runs/, where it is not given.
        max_new_tokens: Longest answer in tokens.
        json_output: Print question, answer and model as one JSON object.
        compile: On a CUDA device: in a conversation compile the LLM for one token at a time, which takes seconds at the
            first answer and makes all others faster. False does without recorded kernels, too.
    """
    name = choose_model(model)
    if not prompt and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    quiet_libraries()
    from mllm.generate import Decoding
    from mllm.stock import load_assistant

    shown: list[str | Video] = [*image, *map(Video, video)]
    faster: Decoding = "recorded" if prompt else "compiled"  # compiling takes longer than one answer does
    assistant = load_assistant(name, faster if compile else "ordinary")
    if not prompt:
        if assistant.compiles:
            print("The first answer takes some seconds longer: the LLM is compiled (--no-compile: it is not).")
        return converse(assistant, shown, max_new_tokens)
    answer = assistant.stream(question([], prompt, shown), max_new_tokens)
    if json_output:
        told = {"model": name, "image": list(image), **({"video": list(video)} if video else {}), "prompt": prompt}
        print(json.dumps({**told, "answer": "".join(answer).strip()}))
    else:
        say(answer)


def converse(assistant: Answers, images: list[str | Video], max_new_tokens: int) -> None:
    """Questions and answers until /exit; images named by /image stand in front of the next question."""
    talk = Talk(assistant, images, max_new_tokens)
    print(f"Ask away. {COMMANDS}")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if line in ("/exit", "/quit"):
            return
        if line:
            talk.hear(line)


def choose_model(model: str) -> str:
    """What was named, else $MLLM_MODEL, else the newest finished run under runs/."""
    if named := model or os.environ.get("MLLM_MODEL", ""):
        return named
    finished = sorted(Path("runs").rglob("connector.safetensors"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise ValueError(NO_MODEL)
    return str(finished[-1].parent)


def evaluate(
    model: Annotated[str, tyro.conf.Positional],
    data: Path,
    image_dir: Path | None = None,
    json_output: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    shuffle_images: bool = False,
    blank_images: bool = False,
    history: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    seed: int = 0,
) -> None:
    """Score a model on a LLaVA-JSON file by exact match.

    Args:
        model: Stage folder, exported folder, or the Hub id of one.
        data: LLaVA-JSON file; each assistant turn is the answer to one question.
        image_dir: Folder that its image names start from; the file's own folder where it is not given.
        json_output: Write accuracies and every answer here.
        shuffle_images: Control: each question gets another sample's image. A model that does not look scores the same.
        blank_images: Control: each image is a plain grey one.
        history: Keep the earlier turns of a conversation, with their right answers, in front of each question.
        batch_size: Questions answered at a time.
        max_new_tokens: Longest answer in tokens.
        seed: Of the shuffling.
    """
    if shuffle_images and blank_images:
        raise ValueError("--shuffle-images and --blank-images are two controls: run them one at a time")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"--batch-size {batch_size} and --max-new-tokens {max_new_tokens}: both are at least 1")
    if json_output:
        check_file(json_output, "--json")
    quiet_libraries()
    from mllm.data.formats.llava import read_llava
    from mllm.evaluate import controls, exact
    from mllm.stock import load_assistant

    samples = read_llava(data, image_dir)
    controls.check_images(samples)
    if shuffle_images:
        samples = controls.shuffle_images(samples, seed)
    if blank_images:
        samples = controls.blank_images(samples)
    exact.run(load_assistant(model), samples, json_output, history, batch_size, max_new_tokens)


def export(
    model: Annotated[str, tyro.conf.Positional],
    to: Literal["transformers", "merged", "adapter", "gguf"] = "transformers",
    out: Path | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    check_with: Annotated[list[str], tyro.conf.UseAppendAction] = [],  # noqa: B006
    overwrite: bool = False,
) -> None:
    """Write a model in a form that others load, and prove that it says the same there.

    Args:
        model: Stage folder or Hub id.
        to: `transformers`: a stock class where one holds the model exactly, else self-contained remote code. `merged`:
            a stage folder with the LoRA in the weights. `adapter`: the LoRA, and beside it the model it belongs to.
            `gguf`: LLM and encoder for llama.cpp.
        out: Folder to write; beside the stage, `NAME-transformers` say, where it is not given.
        dtype: Of the weights; auto is that of the frozen parts in training.
        check_with: A version of transformers (4.57.6) or the path of a Python that must load it too; may be repeated.
            Not given: 4.57.6, from the cache, or installed there by pip once if there is a network. `here`: none.
        overwrite: Replace what an earlier export left in the folder.
    """
    quiet_libraries()
    from mllm.export import export as write

    folder = out or Path(f"{Path(model).name}-{to}" if not Path(model).is_dir() else f"{Path(model)}-{to}")
    print(*write(model, folder, to, dtype, list(check_with), overwrite).lines(), sep="\n")


def push(
    repo: Annotated[str, tyro.conf.Positional],
    model: Annotated[str, tyro.conf.Positional],
    to: Literal["transformers", "merged", "adapter", "gguf"] | None = None,
    private: bool = False,
    dry_run: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    check_with: Annotated[list[str], tyro.conf.UseAppendAction] = [],  # noqa: B006
    exported: Path | None = None,
) -> None:
    """Export a model, prove it, and send it to the Hub with a card made from its run.

    Args:
        repo: OWNER/NAME; made if it is not there.
        model: Stage folder or Hub id of one.
        to: Form, as of `mllm export`; transformers where it is not given.
        private: Make the repository private.
        dry_run: List what would go up and print the card; send nothing.
        dtype: Of the weights; auto, that of the frozen parts in training, where it is not given.
        check_with: As of `mllm export`.
        exported: Folder that `mllm export` made of this model: sent as it was proven, not exported again.
    """
    quiet_libraries()
    from mllm import hub

    if exported:
        hub.check_alone(to, dtype, list(check_with))
    pushed = hub.push(repo, model, to or "transformers", private, dry_run, dtype or "auto", list(check_with), exported)
    print(*([pushed.card] if dry_run else []), *pushed.lines(), sep="\n")


def info(
    model: Annotated[str, tyro.conf.Positional],
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Say what a model is made of, what of it trains, and who can load it; from config files, before any training.

    Args:
        model: YAML of a run, stage folder or Hub id.
        json_output: Print one JSON object.
    """
    quiet_libraries()
    from mllm import oracle

    found = oracle.info(model)
    if json_output:
        print(json.dumps(found.as_dict(), indent=2))
        return
    for part in found.parts:
        trained = f"{part['trained']:,} train" if part["trained"] else "frozen"
        print(f"{part['part']:<16}{part['is']}: {part['parameters']:,} parameters, {trained}")
    fewest, most = found.visual_tokens_range
    tokens = f"{most} visual tokens" if fewest == most else f"{fewest} to {most} visual tokens"
    if most > found.visual_tokens_per_image:
        tokens += f", in tiles of {found.visual_tokens_per_image}"
    print(f"{'image':<16}{tokens}\n{'exports as':<16}{found.exports_as}")
    if found.instead:
        print(f"{'':<16}{found.instead}")
    for loader in found.loaders:
        print(f"{loader.loader:<16}{'yes' if loader.loads else 'no'}, {loader.why} [{loader.version}]")


def main() -> None:
    """The entry point; a user's mistake is one line, not a traceback."""
    commands: dict[str, Callable[..., Any]] = {
        "chat": chat,
        "eval": evaluate,
        "export": export,
        "info": info,
        "push": push,
    }
    if sys.argv[1:] == ["--version"]:
        return print(f"mllm {__version__}")
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="mllm", description=(__doc__ or "").splitlines()[0])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if not (words := unwritten(error)):
            raise
        sys.exit(f"error: the disk takes no more: {words}. Make room, or write to another place")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
