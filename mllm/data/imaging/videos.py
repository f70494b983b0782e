"""Frames of a video file, a folder or list of images, an animated GIF, WebP or PNG.

Enters: a `Video`. Leaves: how many frames it has, by its header; a frame as a Pillow image, upright, its longer side
at most `LONGEST`. Files that hold a stream are read by PyAV (`video_streams.py`), the others by Pillow. The frames of
the last video are kept, since they are asked for one after the other.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from mllm.data.imaging.decoded import flatten, known_formats, sound
from mllm.data.imaging.files import describe, is_local, stream
from mllm.data.imaging.video_streams import MAX_FRAMES, Header, chosen, frames_of_stream, header_of_stream, shrunk
from mllm.types import Frame, ImageSource, Video

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
KNOWN = 1024
"""Headers that are remembered."""


def num_frames(video: Video) -> tuple[int, list[ImageSource] | None]:
    """How many frames there are, and the images themselves where they lie in a list or folder.

    Raises:
        ValueError: names the video and says what is wrong with it.
    """
    listed = images_of(video)
    if listed is not None and not listed:
        raise ValueError(f"cannot read video {describe(video)}: no image in it")
    return (header(video).frames, None) if listed is None else (len(listed), listed)


def images_of(video: Video) -> list[ImageSource] | None:
    """The images of a list, or of a folder in the order of the numbers in their names; None of a file."""
    if isinstance(video.source, tuple):
        return list(video.source)
    if not (isinstance(video.source, str | Path) and is_local(video.source) and os.path.isdir(video.source)):
        return None
    names = [name for name in os.listdir(video.source) if name.lower().endswith(PICTURES) and name[0] != "."]
    return [Path(video.source) / name for name in sorted(names, key=by_number)]


def by_number(name: str) -> list[tuple[int, str]]:
    """`frame_2.jpg` stands before `frame_10.jpg`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def frame(wanted: Frame) -> Image.Image:
    """One frame, decoded together with the others that are looked at.

    Raises:
        ValueError: the video cannot be read, or has fewer frames than its header said.
    """
    with LOCK:
        return frames(wanted.video, wanted.of, stamp(wanted.video))[wanted.number]


def frame_size(wanted: Frame) -> tuple[int, int]:
    """Width and height of a frame, by the header."""
    return header(wanted.video).size


LOCK = threading.Lock()
"""Two threads that ask for the frames of one video shall not both decode it."""


def header(video: Video) -> Header:
    return read_header(video, stamp(video))


def stamp(video: Video) -> tuple[int, ...]:
    """Tells a file from what lay there before."""
    if not (isinstance(video.source, str | Path) and is_local(video.source)):
        return ()
    try:
        told = os.stat(video.source)
    except OSError:
        return ()
    return told.st_mtime_ns, told.st_size


@functools.lru_cache(maxsize=KNOWN)
def read_header(video: Video, _stamp: tuple[int, ...]) -> Header:
    try:
        with opened(video) as file:
            if (picture := animation(file)) is not None:
                return Header(checked(picture).n_frames if hasattr(picture, "n_frames") else 1, shrunk(*picture.size))
            return header_of_stream(file)
    except MemoryError:
        raise
    except Exception as error:  # broken files make both libraries raise far more than OSError
        raise ValueError(f"cannot read video {describe(video)}: {reason(error)}") from error


@functools.lru_cache(maxsize=1)
def frames(video: Video, number: int, _stamp: tuple[int, ...]) -> list[Image.Image]:
    """The `number` chosen frames, decoded."""
    with opened(video) as file:
        picture = animation(file)
        return list(frames_of_stream(file, number) if picture is None else frames_of_animation(picture, number))


@contextmanager
def opened(video: Video) -> Iterator[IO[bytes]]:
    """The file; of a path without a look at its size, since it is read piece by piece."""
    source = video.source
    assert not isinstance(source, tuple | Image.Image | Video | Frame), "not a file"
    if isinstance(source, str | Path) and is_local(source):
        if not os.path.isfile(source):
            raise FileNotFoundError("no such file or folder")
        found: Any = Path(source)
    else:
        found = stream(source)
    with open(found, "rb") if isinstance(found, Path) else found as file:
        yield file


def animation(file: IO[bytes]) -> Image.Image | None:
    """The file as Pillow sees it, if it is an image."""
    try:
        return Image.open(file, formats=known_formats())
    except UnidentifiedImageError:
        file.seek(0)
        return None


def checked(picture: Image.Image) -> Any:
    """The animation, if one of its frames fits in memory and they can be counted."""
    if getattr(sound(picture), "n_frames", 1) > MAX_FRAMES:
        raise ValueError(f"more than {MAX_FRAMES} frames")
    return picture


def frames_of_animation(picture: Image.Image, number: int) -> Iterator[Image.Image]:
    """Frame after frame, as a viewer would show them; alpha is kept, and laid on white by the door."""
    for place in chosen(getattr(checked(picture), "n_frames", 1), number):
        if place:
            picture.seek(place)
        picture.load()
        yield flatten(picture.copy()).resize(shrunk(*picture.size), Image.Resampling.BICUBIC, reducing_gap=3.0)


def reason(error: Exception) -> str:
    return str(error).partition(": '")[0][:300] or type(error).__name__
