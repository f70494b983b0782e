"""A conversation at the keyboard: what each line of `mllm chat` does.

Enters: lines, and an assistant that answers a `Sample`. Leaves: words on the screen as they come, and a conversation
that can be saved in a form that training reads (OpenAI's messages). A mistake is told in a line, and the conversation
goes on without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mllm.types import ImageSource, Mark, Message, Sample, Video

HELP = {
    "/image PATH": "show it with the next question (path, URL or data URI)",
    "/video PATH": "the same of a video: a file, a folder of its frames, a GIF",
    "/clear": "forget what was said",
    "/regen": "answer the last question again",
    "/system WORDS": "told to the assistant before everything else; without words, nothing",
    "/save FILE": "write the conversation as JSON",
    "/help": "this list",
    "/exit": "stop",
}
COMMANDS = "  ".join(HELP)
COMMAND = re.compile(r"/[a-z]+")


class Answers(Protocol):
    """What `mllm.generate.Assistant` is to a conversation."""

    def stream(self, sample: Sample, max_new_tokens: int) -> Iterator[str]: ...


class Talk:
    """What was said so far, and the images that wait for the next question."""

    def __init__(self, assistant: Answers, images: list[str | Video], max_new_tokens: int) -> None:
        self.assistant, self.max_new_tokens = assistant, max_new_tokens
        self.given = images
        """Of the command line: they are there again after /clear."""
        self.told: list[Message] = []
        """What /system said."""
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.show,
            "/video": self.play,
            "/clear": self.clear,
            "/regen": self.again,
            "/system": self.tell,
            "/save": self.save,
            "/help": show_help,
        }
        self.said = Sample("chat", [])
        self.waiting = list(images)

    def hear(self, line: str) -> None:
        """A command, or a question to answer."""
        command, _, rest = line.partition(" ")
        try:
            if not COMMAND.fullmatch(command):
                asked, self.waiting = question(self.said.messages, line, self.waiting), []
                self.answer(asked.messages, [*self.said.images, *asked.images])
            elif command in self.commands:
                self.commands[command](rest.strip())
            else:
                raise ValueError(f"no command {command}; there are {COMMANDS}")
        except (ValueError, OSError) as error:
            print(f"error: {error}")

    def answer(self, messages: list[Message], images: list[ImageSource]) -> None:
        """Print an answer, and keep the conversation that it ends."""
        asked = Sample("chat", [*self.told, *messages], list(images), where="your question")
        words = say(self.assistant.stream(asked, self.max_new_tokens))
        self.said = Sample("chat", [*messages, Message("assistant", [words])], list(images))

    def show(self, name: str) -> None:
        if not name:
            raise ValueError("/image without a path: give a path, a URL or a data URI")
        self.waiting = [*self.waiting, unquoted(name)]

    def play(self, name: str) -> None:
        if not name:
            raise ValueError("/video without a path: give a video file, a folder of its frames, or a GIF")
        self.waiting = [*self.waiting, Video(unquoted(name))]

    def clear(self, _: str) -> None:
        self.said, self.waiting = Sample("chat", []), list(self.given)

    def again(self, _: str) -> None:
        if not self.said.messages:
            raise ValueError("/regen before any question: ask one first")
        self.answer(self.said.messages[:-1], self.said.images)

    def tell(self, words: str) -> None:
        self.told = [Message("system", [words])] if words else []

    def save(self, name: str) -> None:
        if not name:
            raise ValueError("/save without a file: give its path")
        path, images = Path(unquoted(name)), iter(self.said.images)
        messages = [as_parts(message, images) for message in [*self.told, *self.said.messages]]
        path.write_text(json.dumps([{"messages": messages}], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{len(messages)} messages in {path}")


def question(before: list[Message], words: str, images: Sequence[str | Video]) -> Sample:
    """A conversation that ends with a question, its images and videos in front unless the words say where."""
    from mllm.data.formats.record import named, split_at_media

    played = [image.source for image in images if isinstance(image, Video)]
    content, places = split_at_media(words, bool(played))
    shown: Sequence[ImageSource] = images
    if places:
        shown = named(places, [image for image in images if isinstance(image, str)], played)
    else:
        content = [*[Mark.IMAGE] * len(images), *(["\n"] if images else []), *content]
    return Sample("chat", [*before, Message("user", content)], list(shown), where="your question")


def say(pieces: Iterable[str]) -> str:
    """Print an answer as it comes; Ctrl-C ends the answer, not the program."""
    words = ""
    try:
        for piece in pieces:
            words += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
    return words.strip()


def show_help(_: str) -> None:
    for command, does in HELP.items():
        print(f"{command:<16}{does}")


def unquoted(name: str) -> str:
    """A path as it may be typed or dropped into a terminal: in quotes, or from the home folder."""
    if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
        name = name[1:-1]
    return str(Path(name).expanduser()) if name.startswith("~") else name


def as_parts(message: Message, images: Iterator[ImageSource]) -> dict[str, Any]:
    """A message as OpenAI has it; a local image by its full path."""
    if not message.num_images:
        return {"role": message.role, "content": message.text}
    content: list[dict[str, Any]] = []
    for part in message.content:
        if part is Mark.IMAGE:
            image = next(images)
            name = str(image)
            local = not name.startswith(("data:", "http://", "https://", "file://"))
            name = str(Path(name).absolute()) if local else name
            if isinstance(image, Video):
                content.append({"type": "video", "video": name})
            else:
                content.append({"type": "image_url", "image_url": {"url": name}})
        else:
            content.append({"type": "text", "text": str(part)})
    return {"role": message.role, "content": content}
