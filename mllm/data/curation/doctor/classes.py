"""The classes of faults that a data set may have, and what helps against each.

Enters: what a format or the door of images said of a record; or a sample that both took for good. Leaves: the name of
a class, a key of `CLASSES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from mllm.types import Sample

FILE, RECORD, IMAGE, WARNING = 2, 3, 4, 5
"""How bad it is, and the exit code that says so: a file is lost, a record, a record for its image; or all is read."""


class Class(NamedTuple):
    """What is the same for all faults of a class."""

    code: int
    remedy: str


CLASSES = {
    "broken file": Class(FILE, "write or download the file again: nothing behind the broken place is read"),
    "not JSON": Class(RECORD, "mend the line, or write the records again with a JSON library"),
    "placeholder mismatch": Class(RECORD, "write <image> once for each image of the record, where it belongs"),
    "nothing to learn": Class(RECORD, "give the assistant something to say, or remove the record"),
    "missing key": Class(RECORD, "add the key, or name the format that the records have with --format"),
    "unknown speaker": Class(RECORD, "rename the speaker to one of those that are expected"),
    "bad record": Class(RECORD, "mend or remove the record"),
    "missing image": Class(IMAGE, "put the files where the records say, or name their folder or zip with --image-dir"),
    "unreachable image": Class(IMAGE, "download the images first (img2dataset does), or remove the records"),
    "broken image": Class(IMAGE, "download or convert the image again, or remove the record"),
    "duplicate id": Class(WARNING, "give every record an id of its own: later ones are renamed ID~1 as they are read"),
    "empty answer": Class(WARNING, "remove the turn: it teaches to say nothing"),
    "odd turns": Class(WARNING, "let user and assistant take turns: some chat templates refuse all else"),
    "small picture": Class(WARNING, "remove the record, unless its words are about so small a picture"),
    "256-pixel squares": Class(
        WARNING, "download again with `--resize_mode=keep_ratio` and a larger `--image_size`, or `--resize_mode=no`"
    ),
}

RECORDS = {
    "not JSON": re.compile(r"not valid JSON"),
    "placeholder mismatch": re.compile(r"placeholders but \d+ images|texts and \d+ images"),
    "nothing to learn": re.compile(r"nothing to learn from|conversation is empty|no caption"),
    "missing key": re.compile(r"the key .* is missing"),
    "unknown speaker": re.compile(r"unknown (speaker|role)"),
}
"""What formats say of a bad record."""
UNREAD = re.compile(
    r"cannot read image (?P<name>.*): (?P<missing>no such file|no such archive|no .* among the \d+ files)"
)
"""What the door of images says of one that is not there."""


class Finding(NamedTuple):
    """One fault."""

    kind: str
    """Its class."""
    file: str
    row: int | None
    """Number of the record in its file, from 0; None where the file as a whole is meant."""
    id: str
    """The sample's; empty where the record could not be read so far."""
    cause: str


def class_of_record(cause: str) -> str:
    return next((name for name, said in RECORDS.items() if said.search(cause)), "bad record")


def class_of_image(cause: str) -> str:
    if cause.startswith(("cannot read image http://", "cannot read image https://")):
        return "unreachable image"
    return "missing image" if UNREAD.match(cause) else "broken image"


def odd_turns(sample: Sample) -> Iterator[tuple[str, str]]:
    """(class, cause) of what a conversation is read with, and should not have."""
    roles = [message.role for message in sample.messages]
    for number, message in enumerate(sample.messages):
        if message.role == "assistant" and not message.text.strip():
            yield "empty answer", f"message {number}, the assistant's, is empty"
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != [("user", "assistant")[place % 2] for place in range(len(turns))]:
        yield "odd turns", f"the roles are {', '.join(roles[:8])}{', ...' * (len(roles) > 8)}"
    elif turns[-1] == "user":
        yield "odd turns", "the user speaks last and is not answered"
