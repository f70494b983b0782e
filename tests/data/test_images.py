"""The one door for pixels: upright, RGB, as a viewer shows it; or a ValueError that names the image."""

from __future__ import annotations

import base64
import io
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import picture
from mllm.data.images import MAX_BYTES, image_size, open_image
from shared_data import shared

RED, WHITE = (255, 0, 0), (255, 255, 255)
HOSTILE = 400
"""Files tried of the hostile collection: evenly chosen, a few seconds."""


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def grey16(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values.astype(np.uint16)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation: int) -> None:
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # Image.Transpose that the camera did
    upright = Image.new("RGB", (6, 4))
    upright.putdata([(40 * x, 60 * y, 0) for y in range(4) for x in range(6)])
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(Image.Transpose(step))
    exif = Image.Exif()
    exif[274] = orientation
    opened = open_image(encoded(stored, "PNG", exif=exif))
    assert opened.tobytes() == upright.tobytes()


def test_alpha_is_laid_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert pixels(open_image(encoded(image))) == [RED, WHITE]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_laid_on_white(mode: str) -> None:
    image = Image.new(mode, (2, 1))
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), {"P": 1, "L": 255, "RGB": RED}[mode])
    file = encoded(image, transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert pixels(open_image(file)) == [WHITE, WHITE if mode == "L" else RED]


def test_half_transparent_palette_is_mixed_with_white() -> None:
    image = Image.new("P", (1, 1))
    image.putpalette([255, 0, 0])
    [pixel] = pixels(open_image(encoded(image, transparency=bytes([128]))))
    assert pixel == (255, 127, 127)


@pytest.mark.parametrize("top", [65535, 4000, 200])
def test_sixteen_bit_grey_is_scaled_and_not_saturated(top: int) -> None:
    values = np.linspace(0, top, 64).reshape(8, 8)
    opened = np.asarray(open_image(grey16(values)))
    np.testing.assert_allclose(opened[..., 0], values / 257, atol=1)
    assert (opened[..., 0] == opened[..., 2]).all()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([0.0, 1.0], [0, 255]), ([0.0, 255.0], [0, 255]), ([np.nan, 0.5], [0, 127])],
)
def test_float_grey_is_scaled_by_its_range(values: list[float], wanted: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [pixel[0] for pixel in pixels(open_image(image))] == wanted


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "I;16", "I", "F", "RGBA", "RGB"])
def test_every_common_mode_becomes_rgb(mode: str) -> None:
    opened = open_image(Image.new(mode, (5, 3)))
    assert (opened.mode, opened.size) == ("RGB", (5, 3))


def test_cmyk_keeps_its_colours() -> None:
    red, green, blue = open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))
    assert red > 230
    assert max(green, blue) < 40


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    opened = open_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert opened.getpixel((4, 4)) == RED


def test_path_string_bytes_uri_and_picture_give_the_same_pixels(tmp_path: Path) -> None:
    file = encoded(picture(1))
    path = tmp_path / "a picture ü.png"
    path.write_bytes(file)
    uri = "data:image/png;base64," + base64.b64encode(file).decode()
    for source in (path, str(path), file, uri, picture(1)):
        assert open_image(source).tobytes() == picture(1).tobytes()
        assert image_size(source) == (32, 32)


def test_files_are_closed_again(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_size(tmp_path / "a.png")
        open_image(tmp_path / "a.png")


def broken(folder: Path) -> dict[str, Path]:
    """Files that are no image, each for another reason."""
    whole = encoded(picture(1))
    contents = {
        "truncated.png": whole[: len(whole) // 2],
        "truncated.jpg": encoded(picture(1, (64, 64)), "JPEG")[:900],
        "empty.png": b"",
        "text.png": b"no image at all",
        "bomb.png": bomb(),
        "thin.png": encoded(Image.new("L", (9000, 1))),
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in [*contents, "missing.png"]} | {"folder": folder}


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few hundred bytes."""
    file = bytearray(encoded(Image.new("1", (8, 8))))
    file[16:24] = (60_000).to_bytes(4, "big") * 2
    file[29:33] = zlib.crc32(file[12:29]).to_bytes(4, "big")
    return bytes(file)


HEADERLESS = ["empty.png", "text.png", "bomb.png", "thin.png", "svg.png", "missing.png", "folder"]
BROKEN = ["truncated.png", "truncated.jpg", *HEADERLESS]


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_image_is_a_value_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = broken(tmp_path)[name]
    with pytest.raises(ValueError, match="cannot read image") as caught:
        open_image(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", HEADERLESS)
def test_the_header_alone_tells_what_is_no_image(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot read image"):
        image_size(broken(tmp_path)[name])


@pytest.mark.parametrize("source", [b"", b"xyz", "data:image/png;base64,!!!", "data:,", "", "\0", "x" * 5000])
def test_a_source_that_is_nothing_is_a_short_value_error(source: str | bytes) -> None:
    with pytest.raises(ValueError, match="cannot read image") as caught:
        open_image(source)
    assert len(str(caught.value)) < 1000


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match=f"more than {MAX_BYTES}"):
        open_image(tmp_path / "huge.png")


@pytest.mark.filterwarnings("ignore")
def test_every_hostile_file_is_an_image_or_a_value_error_that_names_it() -> None:
    files = sorted(path for path in shared("hostile-images").rglob("*") if path.is_file())
    opened = 0
    for path in files[:: max(1, len(files) // HOSTILE)]:
        try:
            image, error = open_image(path), ""
        except ValueError as refusal:
            image, error = None, str(refusal)
        assert (image.mode == "RGB") if image else (str(path) in error)
        opened += image is not None
    assert opened > 100
