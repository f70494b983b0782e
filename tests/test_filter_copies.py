"""Copies of a picture are found however they were saved, other pictures are not; nor is a benchmark learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from filtering import jpeg, lines, painting, pictures, run, write
from mllm.data.curation.filters import near
from mllm.data.curation.filters.copies import first_copies, found_in
from mllm.data.curation.filters.look import BYTES, look, stacked
from mllm.data.curation.filters.rules import Rules

pytestmark = pytest.mark.usefixtures("alone")


def test_resized_and_recompressed_copies_are_found_and_the_first_is_kept(tmp_path: Path) -> None:
    first = painting(1)
    path = pictures(
        tmp_path,
        first=first,
        half=first.resize((60, 45)),
        square=first.resize((100, 100)),
        compressed=jpeg(first, 20),
        bright=first.point(lambda level: min(255, level * 1.05)),
        other=painting(2),
    )
    removed = run(path, tmp_path / "out", Rules(duplicates=6))
    assert removed == dict.fromkeys(["half#0", "square#0", "compressed#0", "bright#0"], "duplicates")
    told = [line["reason"] for line in lines(tmp_path / "out" / "removed.jsonl")]
    assert all(reason.endswith("first.png") for reason in told)


def test_mirrored_turned_and_recoloured_pictures_are_other_pictures(tmp_path: Path) -> None:
    first = painting(1)
    red, green, blue = first.split()
    others = {
        "mirrored": ImageOps.mirror(first),
        "turned": first.rotate(180),
        "recoloured": Image.merge("RGB", (green, blue, red)),
    }
    assert run(pictures(tmp_path, first=first, **others), tmp_path / "out", Rules(duplicates=6)) == {}


def test_grey_bits_alone_do_not_make_a_copy(tmp_path: Path) -> None:
    red, green = (Image.new("RGB", (64, 64), colour) for colour in ("red", "green"))
    assert look(red)[:8] == look(green)[:8]
    assert run(pictures(tmp_path, red=red, green=green), tmp_path / "out", Rules(duplicates=6)) == {}


def test_several_samples_about_one_file_are_no_copies_of_each_other(tmp_path: Path) -> None:
    painting(1).save(tmp_path / "one.png")
    painting(1, (60, 45)).save(tmp_path / "copy.png")
    records = [{"id": str(n), "image": "one.png", "caption": f"caption {n}"} for n in range(3)]
    records.append({"id": "copy", "image": "copy.png", "captions": ["one", "two"]})
    records[:3] = [{**record, "captions": [record.pop("caption")]} for record in records[:3]]
    assert set(run(write(tmp_path, records), tmp_path / "out", Rules(duplicates=6))) == {"copy#0", "copy#1"}


def test_a_picture_is_not_lost_because_a_worse_copy_stood_first(tmp_path: Path) -> None:
    path = pictures(tmp_path, tiny=painting(1, (30, 22)), whole=painting(1))
    assert run(path, tmp_path / "out", Rules(duplicates=6, min_side=50)) == {"tiny#0": "min_side"}


def looks_of_bits(numbers: list[int]) -> np.ndarray:
    return stacked([number.to_bytes(8, "big") + bytes(BYTES - 8) for number in numbers])


def test_a_chain_of_small_changes_is_not_one_picture() -> None:
    chain = [(1 << bits) - 1 for bits in range(0, 30, 3)]  # each differs from the next in three bits
    assert first_copies(looks_of_bits(chain), 3).tolist() == [-1, 0, -1, 2, -1, 4, -1, 6, -1, 8]


@pytest.mark.parametrize("distance", [0, 2, 6])
@pytest.mark.parametrize("sorting", [0.0, 1.0, 1e9])
def test_near_pairs_are_those_of_all_comparisons(
    monkeypatch: pytest.MonkeyPatch, distance: int, sorting: float
) -> None:
    monkeypatch.setattr(near, "SORTING", sorting)  # another price, another number of tables
    monkeypatch.setattr(near, "AT_ONCE", 50)
    random = np.random.default_rng(0)
    numbers = random.integers(0, 2**64, 300, np.uint64)
    flips = np.bitwise_or.reduce(np.uint64(1) << random.integers(0, 64, (300, distance + 1)).astype(np.uint64), axis=1)
    numbers = np.concatenate([numbers, numbers ^ flips, numbers[:20]])
    wanted = np.argwhere(np.bitwise_count(numbers[:400, None] ^ numbers[None]) <= distance)
    found = {pair for pairs in near.near_pairs(numbers[:400], numbers, distance) for pair in zip(*pairs, strict=True)}
    assert found == set(map(tuple, wanted))


def test_few_tables_of_many_agreeing_blocks_are_taken_for_many_pictures() -> None:
    counts = [len(near.masks(6, number, number)) for number in (100, 10**5, 10**6, 10**7)]
    assert counts == sorted(counts)
    assert counts[-1] <= near.MOST_TABLES


def test_pictures_of_a_benchmark_are_removed_and_named(tmp_path: Path) -> None:
    hidden = tmp_path / "benchmark" / "deep"
    hidden.mkdir(parents=True)
    jpeg(painting(3).resize((200, 150)), 60).save(hidden / "question7.jpg")
    path = pictures(tmp_path, clean=painting(1), leaked=painting(3), leaked_again=painting(3, (80, 60)))
    removed = run(path, tmp_path / "out", Rules(duplicates=6), benchmark=(tmp_path / "benchmark",))
    assert removed == {"leaked#0": "benchmark", "leaked_again#0": "benchmark"}
    assert lines(tmp_path / "out" / "removed.jsonl")[0]["reason"].endswith("deep/question7.jpg")


def test_the_first_of_several_alike_is_the_one_that_is_named() -> None:
    known = looks_of_bits([0b1000, 0b1, 0b0])
    assert found_in(looks_of_bits([0b1, 0xFFFF]), known, 1).tolist() == [1, -1]
    assert found_in(looks_of_bits([0b1, 0xFFFF]), known, 2).tolist() == [0, -1]


def test_a_benchmark_without_images_or_with_a_broken_one_is_an_error(tmp_path: Path) -> None:
    path, folder = pictures(tmp_path, one=painting(1)), tmp_path / "benchmark"
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        run(path, tmp_path / "out", benchmark=(folder,))
    (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        run(path, tmp_path / "out", benchmark=(folder,))
