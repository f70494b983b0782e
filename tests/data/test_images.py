"""The one door for pixels: upright, RGB, as a viewer shows it; or a ValueError that names the image."""

from __future__ import annotations

import base64
import io
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from conftest import picture
from mllm.data.images import image_size, open_image
from mllm.data.imaging.files import MAX_BYTES

pytestmark = pytest.mark.filterwarnings("ignore")
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def grey16(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values.astype(np.uint16)))


UPRIGHT = Image.new("RGB", (6, 4))
UPRIGHT.putdata([(40 * x, 60 * y, 0) for y in range(4) for x in range(6)])
HOW_IT_WAS_HELD = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that the camera did


def held(orientation: int, kind: str = "PNG") -> bytes:
    """The upright picture as a camera stores it, with the note how it was held."""
    done = HOW_IT_WAS_HELD.get(orientation)
    exif = Image.Exif()
    exif[274] = orientation
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    return encoded(UPRIGHT if done is None else UPRIGHT.transpose(Image.Transpose(done)), kind, exif=exif, **lossless)


AVIF = pytest.param(
    "AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", AVIF])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation: int, kind: str) -> None:
    file = held(orientation, kind)
    for source in (file, Image.open(io.BytesIO(file))):
        assert image_size(source) == UPRIGHT.size
        opened = open_image(source)
        assert np.abs(np.asarray(opened).astype(int) - np.asarray(UPRIGHT)).max() <= (4 if kind == "AVIF" else 0)
        assert open_image(opened).tobytes() == opened.tobytes()


def test_a_note_behind_the_pixels_turns_a_png_too() -> None:
    """Where some programs write it; the header alone must say the same."""
    file = held(6)
    length = int.from_bytes(file[33:37], "big") + 12
    assert file[37:41] == b"eXIf"
    late = file[:33] + file[33 + length : -12] + file[33 : 33 + length] + file[-12:]
    assert open_image(late).tobytes() == UPRIGHT.tobytes()
    assert image_size(late) == UPRIGHT.size


def test_a_photograph_with_damaged_notes_is_shown_as_it_is() -> None:
    exif = Image.Exif()
    exif[274] = 6
    file = encoded(UPRIGHT, exif=b"Exif\0\0" + exif.tobytes()[6:12] + b"\xff\xff")
    assert open_image(file).size == image_size(file) == UPRIGHT.size


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_there_is_not_is_upright(orientation: int) -> None:
    assert open_image(held(orientation)).tobytes() == UPRIGHT.tobytes()


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
    [([0.0, 1.0], [0, 255]), ([0.0, 255.0], [0, 255]), ([np.nan, 0.5], [0, 128]), ([-1.0, 0.0], [0, 0])],
)
def test_float_grey_is_scaled_by_its_range(values: list[float], wanted: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [pixel[0] for pixel in pixels(open_image(image))] == wanted


def test_a_transparent_grey_of_sixteen_bits_is_laid_on_white() -> None:
    file = encoded(Image.fromarray(np.array([[1000, 2000]], np.uint16)), transparency=1000)
    assert pixels(open_image(file)) == [WHITE, (8, 8, 8)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F", "RGBA", "RGB"])
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


def test_whatever_names_an_image_gives_the_same_pixels(tmp_path: Path) -> None:
    file = encoded(picture(1))
    path = tmp_path / "a picture ü.png"
    path.write_bytes(file)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "folder/ü.png")
    uri = "data:image/png;base64," + base64.b64encode(file).decode()
    zipped = f"{tmp_path}/a.zip::folder/ü.png"
    rows = {"bytes": file, "path": None}, {"bytes": None, "path": str(path)}, {"bytes": file, "path": "gone.png"}
    for source in (path, str(path), path.as_uri(), file, uri, zipped, Path(zipped), picture(1), *rows):
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
    huge = {"60000": (60_000, 60_000), "9500": (9_500, 9_500)}  # Pillow refuses the first and warns at the second
    contents = {
        "truncated.png": whole[: len(whole) // 2],
        "truncated.jpg": encoded(picture(1, (64, 64)), "JPEG")[:900],
        "empty.png": b"",
        "text.png": b"no image at all",
        **{f"bomb{name}.png": bomb(*size) for name, size in huge.items()},
        "thin.png": encoded(Image.new("L", (9000, 1))),
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        **{f"other.{kind}": encoded(picture(1), kind) for kind in ("tga", "eps", "ico")},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in [*contents, "missing.png"]} | {"folder": folder}


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size in a few hundred bytes."""
    file = bytearray(encoded(Image.new("1", (8, 8))))
    file[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    file[29:33] = zlib.crc32(file[12:29]).to_bytes(4, "big")
    return bytes(file)


HEADERLESS = [
    *("empty.png", "text.png", "bomb60000.png", "bomb9500.png", "thin.png", "svg.png", "missing.png", "folder"),
    *("other.tga", "other.eps", "other.ico"),
]
BROKEN = ["truncated.png", "truncated.jpg", *HEADERLESS]


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_image_is_a_value_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = broken(tmp_path)[name]
    with pytest.raises(ValueError, match="cannot read image") as caught:
        open_image(path)
    assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", HEADERLESS)
def test_the_header_alone_tells_what_is_no_image(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot read image"):
        image_size(broken(tmp_path)[name])


NOTHING = [b"", b"xyz", "data:image/png;base64,!!!", "data:,", "", "\0", "x" * 5000, {}, {"bytes": None, "path": None}]


@pytest.mark.parametrize("source", NOTHING)
def test_a_source_that_is_nothing_is_a_short_value_error(source: Any) -> None:
    with pytest.raises(ValueError, match="cannot read image") as caught:
        open_image(source)
    assert len(str(caught.value)) < 1000


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match=f"more than {MAX_BYTES}"):
        open_image(tmp_path / "huge.png")


LOSSLESS = {"lossless": True}
KINDS = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", LOSSLESS), ("GIF", {}), ("BMP", {})]
KINDS += [("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("JPEG2000", {})]


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("grey_wanted", [False, True])
def test_a_truncated_file_is_an_error_or_whole_and_never_grey(
    kind: str, options: dict[str, Any], grey_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = encoded(picture(1, (61, 47)), kind, **options)
    whole = open_image(file).tobytes()
    refused = 0
    for cut in (1, 2, 5, 12, 100, len(file) // 4, len(file) // 2, len(file) - 40):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", grey_wanted)  # as libraries do behind one's back
        try:
            assert open_image(file[:-cut]).tobytes() == whole
        except ValueError:
            refused += 1
    assert refused >= 4


@pytest.mark.parametrize(("draft", "opened"), [(320, (400, 320)), (100, (200, 160)), (10, (100, 80))])
def test_draft_decodes_a_large_jpeg_at_a_fraction(draft: int, opened: tuple[int, int]) -> None:
    smooth = picture(1, (8, 8)).resize((800, 640), Image.Resampling.BICUBIC)
    file = encoded(smooth, "JPEG", quality=95)
    found, scaled = open_image(file, draft), smooth.resize(opened, Image.Resampling.BICUBIC)
    assert found.size == opened
    assert np.abs(np.asarray(found).astype(int) - np.asarray(scaled)).mean() < 2
    assert image_size(file) == smooth.size


def test_draft_leaves_alone_what_is_less_than_twice_as_large_or_no_jpeg() -> None:
    image = picture(1, (199, 300))
    file = encoded(image, "JPEG")
    assert open_image(file, draft=100).tobytes() == open_image(file).tobytes()
    for source in (encoded(image), image, Image.open(io.BytesIO(file))):
        assert open_image(source, draft=10).size == image.size


def test_draft_turns_upright_what_it_made_small() -> None:
    exif = Image.Exif()
    exif[274] = 6
    assert open_image(encoded(picture(1, (400, 200)), "JPEG", exif=exif), draft=50).size == (50, 100)
