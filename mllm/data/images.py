"""The one door through which pixels enter.

Enters: an image by any of its names (see `image_files`) or a Pillow image. Leaves: an upright RGB image with its
pixels loaded, or one `ValueError` that names the image. Training, chat and evaluation all come through here, so that
a photograph never has two orientations.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import IO

from PIL import Image, ImageFile, UnidentifiedImageError

from mllm.data.imaging.decoded import flatten, known_formats, sound
from mllm.data.imaging.files import describe, stream
from mllm.data.imaging.videos import frame, frame_size
from mllm.types import Frame, ImageSource, Video

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""


def open_image(source: ImageSource, draft: int | None = None) -> Image.Image:
    """Decode, turn upright, flatten to RGB.

    Alpha is laid on white (dropping it would show what the author hid), 16-bit grey is scaled (Pillow alone
    saturates it), of an animation the first frame is taken. Truncated files and decompression bombs are errors.

    `draft` is the least side that is wanted: a JPEG at least twice as large is decoded at a half, quarter or eighth,
    several times faster, with pixels that differ slightly.

    Raises:
        ValueError: names the image and says what is wrong with it.
    """
    # a library that switched this on would have us learn from grey where a part of the file is missing
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with opened(source) as image:
            turn = UPRIGHT.get(orientation(image))
            if draft and image is not source:
                image.draft(None, (draft, draft))
            image.load()
            flat = flatten(sound(image))
        return flat if turn is None else turned(flat, turn)
    except MemoryError:
        raise
    except Exception as error:  # broken files make Pillow raise far more than OSError
        raise ValueError(f"cannot read image {describe(source)}: {reason(error)}") from error


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height of the upright image, from the header alone."""
    if isinstance(source, Frame):
        return frame_size(source)
    try:
        with opened(source) as image:
            return image.size[::-1] if orientation(image) >= 5 else image.size
    except Exception as error:
        raise ValueError(f"cannot read image {describe(source)}: {reason(error)}") from error


def opened(source: ImageSource) -> AbstractContextManager[Image.Image]:
    """The image as far as its header, which promises a size that we are willing to decode."""
    if isinstance(source, Image.Image):
        return nullcontext(sound(source))
    if isinstance(source, Video | Frame):  # of a whole video what stands in its middle
        return nullcontext(sound(frame(source if isinstance(source, Frame) else Frame(source, 0, 1))))
    image = Image.open(stream(source), formats=known_formats())
    try:
        sound(image)
    except ValueError:
        image.close()
        raise
    return image


def orientation(image: Image.Image) -> int:
    """EXIF's word for how the camera was held, 1..8; 1 where there is none or it cannot be read."""
    if image.format == "TIFF":  # Pillow turns these upright itself
        return 1
    if image.format == "PNG" and "exif" not in image.info:
        image.info.update(late_exif(getattr(image, "fp", None)))
    try:
        # not a PNG's own, which decodes all pixels to see what stands behind them
        found = Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:  # viewers show a photograph whose notes are damaged
        return 1
    return found if found in UPRIGHT else 1


def late_exif(file: IO[bytes] | None) -> dict[str, bytes]:
    """The EXIF chunk of a PNG that may stand behind the pixels: its chunks are walked, the pixels skipped."""
    if file is None or file.closed:
        return {}
    before, found = file.tell(), {}
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"eXIf":
            found["exif"] = b"Exif\0\0" + file.read(length)
            break
        file.seek(length + 4, 1)
    file.seek(before)
    return found


def turned(image: Image.Image, turn: Image.Transpose) -> Image.Image:
    """Upright, and without the note that says it is not."""
    upright = image.transpose(turn)
    upright.info.clear()
    return upright


def reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not one of {', '.join(known_formats())}, or its header is damaged"
    return str(error)[:300] or type(error).__name__
