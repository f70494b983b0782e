"""Videos whose frames tell their number: frame i is a plain grey of i * STEP."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

STEP = 10


def grey(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, (number * STEP,) * 3)


def draw_video(path: Path, frames: int, size: tuple[int, int] = (64, 48), codec: str = "mpeg4") -> Path:
    """A file of one stream, with a key frame every fifth."""
    av = pytest.importorskip("av", reason="videos are drawn by PyAV: pip install av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", 5
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(grey(number, size)), format="rgb24")))
        container.mux(stream.encode())
    return path


def draw_gif(path: Path, frames: int, size: tuple[int, int] = (64, 48)) -> Path:
    """A GIF, WebP or PNG, by its name."""
    first, *others = [grey(number, size) for number in range(frames)]
    first.save(path, save_all=True, append_images=others, duration=100, loop=0)
    return path


def draw_folder(path: Path, frames: int, size: tuple[int, int] = (64, 48)) -> Path:
    """Names without leading zeros: frame 2 comes before frame 10."""
    path.mkdir()
    for number in range(frames):
        grey(number, size).save(path / f"frame_{number}.png")
    return path


def turn(path: Path) -> Path:
    """The same MP4 held upright, as a telephone writes it: a quarter turn clockwise in the track's header."""
    data = bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def number_of(image: Image.Image) -> int:
    """Which frame it is."""
    return round(float(np.asarray(image).mean()) / STEP)
