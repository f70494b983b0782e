"""A video as images in a conversation.

Enters: a `Sample` with videos, and how many frames of each are wanted. Leaves: the same with images alone, so that
no room behind this one knows of videos: each chosen frame (see `sampling.py`) is one image, with its own placeholder
and, where `data.image_markers` is `numbered`, its own number. How many there are is told by the video's header.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mllm.data.imaging.sampling import uniform
from mllm.data.imaging.videos import num_frames
from mllm.types import Frame, ImageSource, Mark, Message, Sample, Video


class NoFrames(ValueError):
    """A video cannot be read, so that nobody can say how many images it becomes."""

    kind = "image"


def with_frames(sample: Sample, wanted: int) -> Sample:
    """The sample with up to `wanted` frames in the place of each video; itself, if it has none. No frame is decoded.

    Raises:
        ValueError: `NoFrames`: a video cannot be read.
    """
    if not any(isinstance(image, Video) for image in sample.images):
        return sample
    groups = [frames_of(image, wanted) if isinstance(image, Video) else [image] for image in sample.images]
    numbers = iter([len(group) for group in groups])
    messages = [Message(message.role, spread(message.content, numbers)) for message in sample.messages]
    return replace(sample, messages=messages, images=[image for group in groups for image in group])


def spread(content: list[str | Mark], numbers: Iterator[int]) -> list[str | Mark]:
    """Each image's place as many times as the next number says; marks without an image stay, and are found later."""
    return [part for given in content for part in ([given] * next(numbers, 1) if given is Mark.IMAGE else [given])]


def frames_of(video: Video, wanted: int) -> list[ImageSource]:
    """The chosen frames by name: of a list its images, of a file which of how many."""
    try:
        total, listed = num_frames(video)
    except ValueError as error:
        raise NoFrames(str(error)) from error
    if listed is not None:
        return [listed[place] for place in uniform(total, wanted)]
    number = min(total, wanted)
    return [Frame(video, place, number) for place in range(number)]
