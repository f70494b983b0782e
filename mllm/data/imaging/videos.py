"""Frames of a video file, a folder or list of images, an animated GIF, WebP or PNG.

Enters: a `Video`. Leaves: how many frames it has, by its header; a frame as a Pillow image, upright, its longer side
at most `LONGEST`. Files that hold a stream are read by PyAV (`pip install 'mllm[video]'`), the others by Pillow. Of
a stream only the chosen frames are kept, each shrunk before it becomes RGB; what lies before a frame is decoded from
the nearest key frame on. The frames of the last video are kept, since they are asked for one after the other.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from mllm.data.imaging.decoded import flatten, known_formats, sound
from mllm.data.imaging.files import describe, is_local, stream
from mllm.data.imaging.sampling import uniform
from mllm.types import Frame, ImageSource, Video

LONGEST = 1024
"""Pixels of a frame's longer side: no encoder or grid of tiles reads many more, and 8 frames of 4K would be 200 MB."""
MAX_FRAMES = 2**20
"""Nine hours at 30 frames a second; a few kilobytes of a GIF or an index may claim any number."""
MAX_PIXELS = 2**25
"""Of a frame as it is stored: 8K."""
STREAMS = "mov,matroska,webm,avi,flv,ogg,asf,mpegts,mpeg"
"""What FFmpeg may take a file for. Playlists (HLS, DASH, concat) are not among them: they open other files and URLs."""
SOUGHT = ("mov", "matroska", "avi")
"""Those with an index, in which FFmpeg finds a key frame exactly; the others are decoded from their beginning on."""
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
KNOWN = 1024
"""Headers that are remembered."""


@dataclass(frozen=True)
class Header:
    """What the beginning of a file tells."""

    frames: int
    size: tuple[int, int]
    """Width and height of a frame as it leaves this room."""


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


def chosen(total: int, number: int) -> list[int]:
    """The places of so many frames.

    Raises:
        ValueError: there are fewer.
    """
    if total < number:
        raise ValueError(f"{total} frames, {number} were promised by its header: the file is cut or was changed")
    return uniform(total, number)


@contextmanager
def demuxed(file: IO[bytes]) -> Iterator[tuple[Any, Any]]:
    """Container and video stream of an open file."""
    try:
        import av
    except ImportError as error:
        raise ValueError("videos are decoded by PyAV: pip install 'mllm[video]'") from error
    with av.open(file, options={"format_whitelist": STREAMS}, metadata_errors="replace") as container:
        if not container.streams.video:
            raise ValueError("it holds no video, or is of no known format")
        found = container.streams.video[0]
        found.codec_context.thread_count = 1  # a worker is one of many processes already
        found.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        yield container, found


def header_of_stream(file: IO[bytes]) -> Header:
    """Frames as the container counts them, or its packets where it does not (WebM); no frame but the first is decoded,
    which alone tells how the camera was held, and whether there is a decoder."""
    with demuxed(file) as (container, found):
        first = next(container.decode(found), None)
        if first is None:
            raise ValueError("no frame can be decoded")
        size, total = shrunk(first.width, first.height), found.frames
        size = size[::-1] if first.rotation % 180 else size
    total = total if total > 0 else len(times(file))
    if not 0 < total <= MAX_FRAMES:
        raise ValueError(f"{total} frames: expected 1 to {MAX_FRAMES}")
    return Header(total, size)


def times(file: IO[bytes]) -> list[tuple[int, bool]]:
    """When each frame is shown, in the stream's own unit, and whether it is a key frame; nothing is decoded."""
    told = []
    file.seek(0)
    with demuxed(file) as (container, found):
        for packet in container.demux(found):
            when = packet.dts if packet.pts is None else packet.pts
            if packet.size and when is not None and not packet.is_discard:
                told.append((when, packet.is_keyframe))
            if len(told) > MAX_FRAMES:
                raise ValueError(f"more than {MAX_FRAMES} frames")
    return sorted(told)


def frames_of_stream(file: IO[bytes], number: int) -> Iterator[Image.Image]:
    """The chosen frames of a stream, sought by the key frame before each where the container can tell where that is."""
    known = times(file)
    keys = [when for when, is_key in known if is_key] or [when for when, _ in known[:1]]
    places = chosen(len(known), number)
    file.seek(0)
    with demuxed(file) as (container, found):
        at, decoded = known[0][0], container.decode(found)
        seeks = container.format.name.partition(",")[0] in SOUGHT
        for place in places:
            when = known[place][0]
            key = keys[max(0, bisect_right(keys, when) - 1)]
            if seeks and key > at:  # else going on is shorter than going back
                container.seek(key, stream=found)
                decoded = container.decode(found)
            picture = next((one for one in decoded if one.pts is not None and one.pts >= when), None)
            if picture is None:
                raise ValueError(f"it ends before frame {place + 1} of {len(known)}: the file is cut or damaged")
            at = picture.pts
            yield upright(picture)


def upright(picture: Any) -> Image.Image:
    """A decoded frame as RGB, shrunk, and turned as the camera was held."""
    width, height = shrunk(picture.width, picture.height)
    image = Image.fromarray(picture.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC"))
    return image.rotate(picture.rotation, expand=True) if picture.rotation else image


def shrunk(width: int, height: int) -> tuple[int, int]:
    """Width and height, the longer one at most `LONGEST`."""
    scale = min(1.0, LONGEST / max(width, height, 1))
    return max(1, round(width * scale)), max(1, round(height * scale))


def reason(error: Exception) -> str:
    return str(error).partition(": '")[0][:300] or type(error).__name__
