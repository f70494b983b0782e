"""A video is so many images: chosen by one policy, counted by its header, decoded as they were counted."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_processor, picture
from mllm.data.formats.llava import LlavaSource
from mllm.data.formats.messages import MessagesSource
from mllm.data.images import image_size, open_image
from mllm.data.imaging import video_streams, videos
from mllm.data.imaging.sampling import uniform
from mllm.data.index import build_index
from mllm.data.loader import Examples
from mllm.data.processor import Processor
from mllm.evaluate.controls import blank_images, shuffle_images
from mllm.types import Frame, Mark, Message, Sample, Video
from records import asked, llava, read, read_one
from video_files import draw_folder, draw_gif, draw_video, number_of, turn

ANSWER = Message("assistant", ["red"])


def sample(*images: Any) -> Sample:
    return Sample("s", [Message("user", [*[Mark.IMAGE] * len(images), "what?"]), ANSWER], list(images), where="here")


def framed(video: Path | str | tuple[Any, ...], frames: int = 4) -> list[Any]:
    parts = make_processor(2)
    return Processor(parts.tokenizer, parts.image_processor, 2, video_frames=frames).framed(sample(Video(video))).images


def seen(video: Any, frames: int = 4) -> list[int]:
    """The numbers of the frames that are looked at."""
    return [number_of(open_image(image)) for image in framed(video, frames)]


@given(st.integers(1, 10_000), st.integers(1, 300))
def test_chosen_frames_are_the_middles_of_equal_segments(total: int, wanted: int) -> None:
    chosen = uniform(total, wanted)
    assert len(chosen) == min(total, wanted) == len(set(chosen))
    assert chosen == sorted(chosen)
    width = Fraction(total, len(chosen))
    for place, frame in enumerate(chosen):  # frame f is shown from f to f + 1
        assert frame <= (place + Fraction(1, 2)) * width < frame + 1
    mirrored = [total - 1 - frame for frame in reversed(chosen)]
    assert max(abs(one - other) for one, other in zip(chosen, mirrored, strict=True)) <= 1  # no end is favoured


@given(st.integers(1, 300), st.integers(0, 300))
def test_short_videos_give_each_frame_once(total: int, more: int) -> None:
    assert uniform(total, total + more) == list(range(total))


DRAWN = {
    "clip.mp4": draw_video,
    "clip.avi": draw_video,
    "clip.gif": draw_gif,
    "clip.webp": draw_gif,
    "clip.png": draw_gif,
    "clip": draw_folder,
}


@pytest.fixture(params=DRAWN)
def clip(request: Any, tmp_path: Path) -> Path:
    """A video of 12 frames, in each form."""
    return DRAWN[request.param](tmp_path / request.param, 12)


@pytest.mark.parametrize("frames", [1, 5, 20])
def test_frames_are_those_of_the_policy_upright_and_of_the_promised_size(clip: Path, frames: int) -> None:
    assert seen(clip, frames) == uniform(12, frames)
    images = framed(clip, frames)
    assert {open_image(image).size for image in images} == {image_size(image) for image in images} == {(64, 48)}
    assert {open_image(image).mode for image in images} == {"RGB"}


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
@pytest.mark.parametrize("frames", [1, 5, 40])
def test_frames_between_key_frames_are_found_whatever_their_order_in_the_file(
    tmp_path: Path, name: str, frames: int
) -> None:
    clip = draw_video(
        tmp_path / name, 25, codec="libx264"
    )  # frames that are predicted from later ones, 5 to a key frame
    assert seen(clip, frames) == uniform(25, frames)


def test_container_that_counts_no_frames_has_its_packets_counted(tmp_path: Path) -> None:
    clip = draw_video(tmp_path / "clip.webm", 12, codec="libvpx")
    assert seen(clip, 5) == uniform(12, 5)
    assert len(framed(clip, 20)) == 12


def test_bytes_and_lists_of_frames_are_videos_too(tmp_path: Path) -> None:
    clip, folder = draw_video(tmp_path / "clip.mp4", 12), draw_folder(tmp_path / "frames", 3)
    assert seen(clip.read_bytes(), 3) == uniform(12, 3)
    assert seen(tuple(folder / f"frame_{number}.png" for number in (2, 0, 1)), 2) == [2, 1]


def test_camera_held_upright_turns_frames_and_their_size(tmp_path: Path) -> None:
    flat, upright = draw_video(tmp_path / "a.mp4", 3), turn(draw_video(tmp_path / "b.mp4", 3))
    [first, *_], [second, *_] = framed(flat), framed(upright)
    assert image_size(second) == image_size(first)[::-1] == (48, 64)
    assert np.array_equal(np.rot90(np.asarray(open_image(first)), -1), np.asarray(open_image(second)))


def test_large_frames_are_shrunk_as_promised(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(video_streams, "LONGEST", 40)
    for drawn in (draw_video(tmp_path / "a.mp4", 2, (120, 60)), draw_gif(tmp_path / "a.gif", 2, (120, 60))):
        assert {open_image(image).size for image in framed(drawn)} == {image_size(framed(drawn)[0])} == {(40, 20)}


def test_frames_of_a_video_are_decoded_together_once(tmp_path: Path, monkeypatch: Any) -> None:
    opened, real = [], videos.frames_of_stream
    monkeypatch.setattr(videos, "frames_of_stream", lambda *given: opened.append(1) or real(*given))
    parts = make_processor(2)
    parts(sample(Video(draw_video(tmp_path / "clip.mp4", 12))))
    assert opened == [1]


# ---------------------------------------------------------------- what cannot be read


def test_what_is_no_video_is_an_error_that_names_it(tmp_path: Path) -> None:
    whole = draw_video(tmp_path / "whole.mp4", 12).read_bytes()
    playlist = b"#EXTM3U\n#EXTINF:1,\n" + str(tmp_path / "whole.mp4").encode() + b"\n#EXT-X-ENDLIST\n"
    broken = {"empty": b"", "words": b"no video\n" * 99, "head": whole[:200], "list.m3u8": playlist}
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"cannot read video .*{name}"):
            framed(tmp_path / name)
    (tmp_path / "bare").mkdir()
    for name in ("bare", "missing.mp4"):
        with pytest.raises(ValueError, match=f"cannot read video .*{name}"):
            framed(tmp_path / name)


def outcome(video: bytes) -> str:
    try:
        return f"{len([open_image(image) for image in framed(video)])} frames"
    except ValueError as error:
        return str(error)


def test_noise_in_a_file_ends_in_frames_or_in_a_clear_error(tmp_path: Path) -> None:
    whole = draw_video(tmp_path / "whole.mp4", 12).read_bytes()
    for seed in range(30):
        rng, data = np.random.default_rng(seed), bytearray(whole)
        for at in rng.integers(0, len(data), 40):
            data[at] = rng.integers(256)
        told = outcome(bytes(data[: rng.integers(100, len(data))]))
        assert told == "4 frames" or told.startswith("cannot read "), told


def test_frames_larger_than_memory_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(video_streams, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="cannot read video"):
        framed(draw_video(tmp_path / "clip.mp4", 2))


def test_without_pyav_gifs_are_read_and_videos_say_what_to_install(tmp_path: Path, monkeypatch: Any) -> None:
    gif, clip = draw_gif(tmp_path / "clip.gif", 3), draw_video(tmp_path / "clip.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    assert seen(gif) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"pip install 'mllm\[video\]'"):
        framed(clip)


# ---------------------------------------------------------------- records


def test_llava_records_name_videos(tmp_path: Path) -> None:
    turns = ("human", "<video>\nwhat?"), ("gpt", "red")
    one = read_one(tmp_path, "llava", llava(*turns, video="a.mp4"))
    assert one.images == [Video(tmp_path / "a.mp4")]
    assert one.messages[0].content == [Mark.IMAGE, "\nwhat?"]
    listed = read_one(tmp_path, "llava", llava(*turns, video=["1.jpg", "2.jpg"]))
    assert listed.images == [Video((tmp_path / "1.jpg", tmp_path / "2.jpg"))]
    mixed = ("human", "<video><image><video>?"), ("gpt", "red")
    found = read_one(tmp_path, "llava", llava(*mixed, image="i.png", videos=["a.mp4", "b.mp4"]))
    assert found.images == [Video(tmp_path / "a.mp4"), tmp_path / "i.png", Video(tmp_path / "b.mp4")]
    # LLaVA-Video's own files say <image>
    assert read_one(tmp_path, "llava", llava(("human", "<image>?"), turns[1], video="a.mp4")).images == one.images
    assert read_one(tmp_path, "llava", llava(*turns, video="a.mp4"), bare=True).messages[0].content == [Mark.IMAGE]


def test_message_parts_name_videos(tmp_path: Path) -> None:
    for part in (
        {"type": "video", "video": "a.mp4"},
        {"type": "video", "path": "a.mp4"},
        {"type": "video", "url": "a.mp4"},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
    ):
        found = read_one(tmp_path, "messages", asked([part, {"type": "text", "text": "what <video> is"}]))
        assert found.images == [Video(tmp_path / "a.mp4")]
        assert found.messages[0].content == [Mark.IMAGE, "what <video> is"]
    frames = read_one(tmp_path, "messages", asked([{"type": "video", "video": ["1.jpg", "2.jpg"]}]))
    assert frames.images == [Video((tmp_path / "1.jpg", tmp_path / "2.jpg"))]
    for content in ("<video>?", [{"type": "video"}]):
        assert read_one(tmp_path, "messages", asked(content, videos=["a.mp4"])).images == [Video(tmp_path / "a.mp4")]


def test_places_and_videos_must_be_as_many(tmp_path: Path) -> None:
    record = llava(("human", "<video><video>?"), ("gpt", "red"), video="a.mp4")
    [error] = read(tmp_path, "llava", json.dumps(record))
    assert "2 <image> placeholders but 1 images" in str(error)


# ---------------------------------------------------------------- index, holes, prompts


def write(folder: Path, names: list[str]) -> LlavaSource:
    said = [("human", "<video>\nwhat?"), ("gpt", "red")]
    (folder / "data.json").write_text(json.dumps([llava(*said, id=name, video=name) for name in names]))
    return LlavaSource(path=folder / "data.json")


@pytest.mark.parametrize("settings", [{}, {"tiles": "dynamic", "max_tiles": 4}, {"image_markers": "numbered"}])
def test_index_counts_what_the_processor_makes(tmp_path: Path, settings: dict[str, Any]) -> None:
    names = ["wide.mp4", "short.mp4", "up.mp4", "a.gif"]
    draw_video(tmp_path / "wide.mp4", 12, (128, 32))
    draw_video(tmp_path / "short.mp4", 2)
    turn(draw_video(tmp_path / "up.mp4", 12, (128, 32)))
    draw_gif(tmp_path / "a.gif", 5)
    parts = make_processor(2)
    processor = Processor(parts.tokenizer, parts.image_processor, 2, video_frames=3, **settings)
    index = build_index([write(tmp_path, names)], processor, 2048, progress=False)
    assert index.images.tolist() == [3, 2, 3, 3]
    examples = [Examples(index, processor).example(number) for number in range(4)]
    assert [example.fault for example in examples] == [None] * 4
    assert [len(example.input_ids) for example in examples] == index.length.tolist()
    assert [len(example.pixel_values) for example in examples] == index.tiles.tolist()
    if "image_markers" in settings:
        assert "(image 3: <Image>" in processor.tokenizer.decode(examples[0].input_ids)


def test_video_cut_after_it_was_indexed_is_a_hole_of_its_planned_length(tmp_path: Path) -> None:
    clip = draw_video(tmp_path / "a.mp4", 12)
    draw_gif(tmp_path / "b.gif", 3)
    (tmp_path / "c.mp4").write_bytes(b"no video")
    processor = make_processor(2)
    index = build_index([write(tmp_path, ["a.mp4", "b.gif", "c.mp4"])], processor, 2048, progress=False)
    assert [(fault.kind, fault.id) for fault in index.faults] == [("image", "c.mp4")]
    whole = clip.read_bytes()
    # the frames' bytes are gone, the header still counts them: it stands at the end of such a file
    start, stop = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
    clip.write_bytes(whole[: start + 90] + bytes(stop - start - 90) + whole[stop:])
    hole = Examples(index, processor).example(0)
    assert hole.fault is not None
    assert hole.fault.kind == "image"
    assert "a.mp4" in hole.fault.cause
    assert len(hole.input_ids) == index.length[0]


def test_rows_that_cut_a_video_keep_its_first_frames(tmp_path: Path) -> None:
    draw_video(tmp_path / "a.mp4", 12)
    source = MessagesSource(path=tmp_path / "data.json")
    content = [{"type": "text", "text": "x"}, SAID_TWICE]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "red"}]
    turns += [{"role": "user", "content": content}, {"role": "assistant", "content": "blue"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": turns}]))
    processor = make_processor(4)
    whole = build_index([source], processor, 2048, progress=False)
    cut = build_index([source], processor, int(whole.length[0]) - 20, progress=False)
    assert 0 < cut.images[0] < whole.images[0] == 8
    example = Examples(cut, processor).example(0)
    assert example.fault is None
    assert len(example.pixel_values) == cut.images[0]


SAID_TWICE = {"type": "video", "video": "a.mp4"}


def test_prompt_of_a_video_is_that_of_its_frames_as_images(tmp_path: Path) -> None:
    clip, processor = draw_video(tmp_path / "a.mp4", 12), make_processor(2)
    video, image = Video(clip), picture(1)
    question = Sample("q", [Message("user", ["a", Mark.IMAGE, "b", Mark.IMAGE, "?"])], [video, image])
    frames = [open_image(Frame(video, number, 8)) for number in range(8)]
    by_hand = Message("user", ["a", *[Mark.IMAGE] * 8, "b", Mark.IMAGE, "?"])
    prompt, other = processor.prompt(question), processor.prompt(Sample("q", [by_hand], [*frames, image]))
    assert prompt.input_ids == other.input_ids
    assert np.array_equal(prompt.pixel_values.numpy(), other.pixel_values.numpy())


def test_a_saved_processor_remembers_how_many_frames(tmp_path: Path) -> None:
    parts = make_processor(2)
    Processor(parts.tokenizer, parts.image_processor, 2, video_frames=3).save(tmp_path)
    assert Processor.load(tmp_path).video_frames == 3


def test_a_stream_reads_videos_as_the_index_does(tmp_path: Path) -> None:
    draw_video(tmp_path / "a.mp4", 12)
    source, processor = write(tmp_path, ["a.mp4"]), make_processor(2)
    [found] = source.read()
    assert isinstance(found, Sample)
    kept = processor.encoded(found)
    index = build_index([source], processor, 2048, progress=False)
    assert (kept.images, kept.tiles, len(kept.input_ids)) == (8, int(index.tiles[0]), int(index.length[0]))
    assert len(processor.example(found, kept.input_ids, kept.labels).pixel_values) == 8


def test_controls_of_evaluation_keep_the_number_of_frames(tmp_path: Path) -> None:
    one, other = (sample(Video(draw_video(tmp_path / name, 12))) for name in ("a.mp4", "b.mp4"))
    assert [shown.images for shown in shuffle_images([one, other], 0)] == [other.images, one.images]
    processor = make_processor(2)
    [blank] = blank_images([one])
    example = processor(blank)
    assert example.input_ids == processor(one).input_ids
    assert bool((example.pixel_values == 128).all())


def test_check_looks_at_videos(tmp_path: Path) -> None:
    draw_video(tmp_path / "a.mp4", 12)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    write(tmp_path, ["a.mp4", "b.mp4"])
    script = Path(__file__).parents[2] / "data_scripts" / "check.py"
    told = subprocess.run([sys.executable, script, tmp_path / "data.json"], capture_output=True, text=True)
    assert told.returncode != 0
    assert "b.mp4" in told.stdout + told.stderr
    assert "a.mp4" not in told.stdout + told.stderr
    assert "Traceback" not in told.stderr
