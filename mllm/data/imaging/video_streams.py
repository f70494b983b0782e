"""Frames of a file that holds a video stream, by PyAV (`pip install 'mllm[video]'`).

Enters: an open file, how many frames are wanted. Leaves: its header; the chosen frames as Pillow images, upright, the
longer side at most `LONGEST`. Only these are kept, each shrunk before it becomes RGB; what lies before a frame is
decoded from the nearest key frame on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from PIL import Image

from mllm.data.imaging.sampling import uniform

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


@dataclass(frozen=True)
class Header:
    """What the beginning of a file tells."""

    frames: int
    size: tuple[int, int]
    """Width and height of a frame as it leaves this room."""


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
