"""Features in a folder are those of the encoder, bit for bit, whoever wrote them and however the writer ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from test_feature_cache import BYTES, PATCHES, WIDTH, Counting, images
from torch import Tensor

from mllm.models import stored_features
from mllm.models.feature_cache import GROUP, FeatureCache, digest
from mllm.models.feature_folder import CHECK, KEY, FeatureFolder
from mllm.models.stored_features import StoredFeatures

WHAT: dict[str, Any] = {"encoder weights": "a1", "image processor": "b2", "feature layers": [[3]]}
ENTRY = BYTES + KEY + CHECK


def folder_of(path: Path, gigabytes: float = 1.0, say: Callable[[str], None] = print, **other: Any) -> FeatureFolder:
    return FeatureFolder(path, {**WHAT, **other}, (PATCHES, WIDTH), torch.float32, gigabytes, say)


def stored(path: Path, gigabytes: float = 1.0, say: Callable[[str], None] = print) -> StoredFeatures:
    return StoredFeatures(folder_of(path, gigabytes, say), pin=False)


def live(shown: Tensor) -> Tensor:
    """What the encoder gives, in groups of the same size."""
    return FeatureCache(gigabytes=0)(Counting(), shown)


def features(cache: StoredFeatures, encoder: Counting, shown: Tensor) -> Tensor:
    found = cache(encoder, shown)
    cache.finish()
    return found


def test_stored_equals_live_over_epochs_and_a_second_run_that_encodes_nothing(tmp_path: Path) -> None:
    shown, first, second = images(11), Counting(), Counting()
    cache = stored(tmp_path)
    for order in (torch.arange(11), torch.tensor([3, 3, 0, 10])):
        assert torch.equal(features(cache, first, shown[order]), live(shown)[order])
    assert first.seen == 11
    assert torch.equal(features(stored(tmp_path), second, shown.flip(0)), live(shown).flip(0))
    assert second.seen == 0


def test_bfloat16_comes_back_as_it_was(tmp_path: Path) -> None:
    given = torch.randn(2, PATCHES, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    keys = [b"a" * KEY, b"b" * KEY]
    for _ in range(2):
        folder = FeatureFolder(tmp_path, WHAT, (PATCHES, WIDTH), torch.bfloat16, 1.0)
        folder.keep(keys, given)
        found = torch.zeros_like(given)
        assert all(folder.load(key, own) for key, own in zip(keys, found, strict=True))
        assert torch.equal(found, given)


def test_step_gives_its_micro_batches_in_order_and_the_first_is_read_ahead(tmp_path: Path) -> None:
    cache, encoder, shown = stored(tmp_path), Counting(), images(12)
    features(cache, encoder, shown)
    batches: list[Any] = [{"pixel_values": part, "num_images": len(part)} for part in shown.split(3)]
    ahead = cache.one_ahead(iter(batches), accumulation=2)
    for step in range(2):
        block = [next(ahead) for _ in range(2)]
        begun = [own for own, _ in cache.begun]
        assert step == 1 or any(own is batches[2]["pixel_values"] for own in begun)
        pixels = [batch["pixel_values"] for batch in block]
        taking = cache.step(encoder, pixels, lambda tensor: tensor)
        for own in pixels:
            assert torch.equal(taking.take(len(own)), live(own))
    assert next(ahead, None) is None
    assert encoder.seen == 12


def test_what_is_copied_late_is_waited_for_and_no_buffer_is_used_while_it_travels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: copies are done when somebody waits for them, and those to the device at the end of the step."""

    def late(given: Tensor, pin: bool) -> tuple[Tensor, Callable[[], None]]:
        on_host, on_device = torch.full_like(given, torch.nan), given.clone()

        def wait() -> None:
            on_host.copy_(on_device)

        return on_host, wait

    travelling: list[tuple[Tensor, Tensor]] = []

    def send(on_host: Tensor) -> Tensor:
        travelling.append((on_host, on_host.clone()))
        return on_host.clone()

    monkeypatch.setattr(stored_features, "to_host", late)
    shown, encoder = images(12), Counting()
    for cache in (stored(tmp_path), stored(tmp_path)):
        taking = cache.step(encoder, shown.split(3), send)
        found = torch.cat([taking.take(3) for _ in range(4)])
        cache.finish()
        assert torch.equal(found, live(shown))
    assert encoder.seen == 12
    assert len(travelling) >= 8
    assert all(torch.equal(on_host.view(torch.int32), sent.view(torch.int32)) for on_host, sent in travelling)


@pytest.mark.parametrize("torn", ["keys", "features"])
def test_torn_tail_is_passed_over(tmp_path: Path, torn: str) -> None:
    features(stored(tmp_path), Counting(), images(4))
    (path,) = tmp_path.glob(f"*.{torn}")
    os.truncate(path, path.stat().st_size - 3)
    encoder = Counting()
    assert torch.equal(features(stored(tmp_path), encoder, images(4)), live(images(4)))
    assert encoder.seen == 1


def test_spoiled_entry_is_encoded_anew_and_mended(tmp_path: Path) -> None:
    features(stored(tmp_path), Counting(), images(4))
    (path,) = tmp_path.glob("*.features")
    with path.open("r+b") as file:
        file.seek(BYTES + 1)
        file.write(b"\x55\xaa")
    for seen in (1, 0):
        encoder = Counting()
        assert torch.equal(features(stored(tmp_path), encoder, images(4)), live(images(4)))
        assert encoder.seen == seen


def write_for_ever(path: Path) -> None:
    torch.set_num_threads(1)
    folder, number = folder_of(path), 0
    while True:
        shown = torch.full((GROUP, 3, 8, 8), 0, dtype=torch.uint8)
        shown[:, 0, 0, :4] = torch.arange(number, number + GROUP)[:, None] // 256 ** torch.arange(4) % 256
        folder.keep([digest(image) for image in shown], Counting()(shown))
        number += GROUP


def test_all_that_a_killed_writer_left_is_right(tmp_path: Path) -> None:
    writer = get_context("fork").Process(target=write_for_ever, args=(tmp_path,))
    writer.start()
    while not any(path.stat().st_size > 40 * ENTRY for path in tmp_path.glob("*.features")):
        assert writer.is_alive()
    assert writer.pid
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    folder, found = folder_of(tmp_path), torch.empty(PATCHES, WIDTH)
    assert len(folder.places) >= 30
    assert all(folder.load(key, found) for key in list(folder.places))


def test_two_writers_find_what_the_other_wrote_meanwhile(tmp_path: Path) -> None:
    one, other, encoder = stored(tmp_path), stored(tmp_path), Counting()
    features(one, encoder, images(3))
    features(other, encoder, images(6))
    assert torch.equal(features(one, encoder, images(6)), live(images(6)))
    assert encoder.seen == 6
    assert len(list(tmp_path.glob("*.keys"))) == 2


@pytest.mark.parametrize("name", WHAT)
def test_stale_folder_is_refused_with_what_differs(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path)
    with pytest.raises(ValueError, match=f"{name}: .* there, other here") as told:
        folder_of(tmp_path, **{name: "other"})
    assert not any(same in str(told.value) for same in WHAT.keys() - {name})


def test_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis.txt"):
        folder_of(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_manifest_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"encoder')
    with pytest.raises(ValueError, match="is not JSON"):
        folder_of(tmp_path)


def test_limit_holds_for_all_writers_and_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    room = (5 * ENTRY + 1) / 2**30
    features(stored(tmp_path, room), Counting(), images(3))
    cache = stored(tmp_path, room, told.append)
    for _ in range(2):
        assert torch.equal(features(cache, Counting(), images(9)), live(images(9)))
    assert sum(p.stat().st_size for suffix in ("keys", "features") for p in tmp_path.glob(f"*.{suffix}")) == 5 * ENTRY
    assert len(told) == 1
    assert "limit" in told[0]


def test_full_disk_ends_the_keeping_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    cache = stored(tmp_path, say=told.append)

    def full(file: int, content: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mllm.models.feature_folder.os.write", full)
    assert torch.equal(features(cache, Counting(), images(3)), live(images(3)))
    assert "No space left" in told[0]
