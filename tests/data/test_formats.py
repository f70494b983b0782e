"""Every format becomes samples; what cannot become one is named with its file, its row and the remedy."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from mllm.data.formats import SourceConfig
from mllm.data.formats.auto import AutoSource
from mllm.types import Mark, Sample
from records import CLASSES, DATA_URI, GOOD, SAID, asked, llava, read, read_one
from writers import json_lines, shard


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("layout", ["lines", "list", "indented list", "blank lines", "windows", "space first"])
def test_a_list_and_lines_give_the_same_samples(tmp_path: Path, kind: str, layout: str) -> None:
    records = [{**GOOD[kind], "id": str(i)} for i in range(3)]
    lines = [json.dumps(record) for record in records]
    text = {
        "lines": "\n".join(lines),
        "list": json.dumps(records),
        "indented list": json.dumps(records, indent=2),
        "blank lines": "\n\n".join(lines) + "\n\n",
        "windows": "\ufeff" + "\r\n".join(lines),
        "space first": " \n\t" + json.dumps(records),
    }[layout]
    assert read(tmp_path, kind, text) == read(tmp_path, kind, "\n".join(lines))
    assert len(read(tmp_path, kind, text)) == 3


def test_llava_reads_turns_images_and_the_rest(tmp_path: Path) -> None:
    turns = [("system", "be brief"), ("human", "<image>\nwhat?"), ("gpt", "red"), ("human", "and?"), ("gpt", "blue")]
    sample = read_one(tmp_path, "llava", llava(*turns, id=7, image="x/a.png", kind="colour"))
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert sample.messages[1].content == [Mark.IMAGE, "\nwhat?"]
    assert (sample.id, sample.images, sample.meta) == ("7", [tmp_path / "x/a.png"], {"kind": "colour"})
    assert sample.where == f"{tmp_path / 'data.jsonl'}, row 0"


def test_llava_reads_several_images_in_order(tmp_path: Path) -> None:
    record = llava(("human", "<image> or <image>?"), ("gpt", "red"), image=["b.png", "a.png"])
    sample = read_one(tmp_path, "llava", record, image_dir=tmp_path / "pics")
    assert sample.images == [tmp_path / "pics/b.png", tmp_path / "pics/a.png"]
    assert sample.messages[0].content == [Mark.IMAGE, " or ", Mark.IMAGE, "?"]


@pytest.mark.parametrize("keys", [{}, {"image": None}, {"image": []}, {"id": None}])
def test_llava_reads_text_alone(tmp_path: Path, keys: dict[str, Any]) -> None:
    sample = read_one(tmp_path, "llava", llava(("human", "hello"), ("gpt", "hi"), **keys))
    assert (sample.id, sample.images, sample.messages[0].content) == ("data/0", [], ["hello"])


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"type": "image_url", "image_url": {"url": "https://x.y/a.png", "detail": "low"}}, "https://x.y/a.png"),
        ({"type": "image_url", "image_url": {"url": DATA_URI}}, DATA_URI),
        ({"type": "image_url", "image_url": DATA_URI}, DATA_URI),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "url": "a.png"}, "a.png"),
    ],
)
def test_messages_reads_every_kind_of_image_part(tmp_path: Path, part: dict[str, Any], image: str) -> None:
    sample = read_one(tmp_path, "messages", asked([{"type": "text", "text": "see"}, part]))
    assert sample.messages[0].content == ["see", Mark.IMAGE]
    assert sample.images == [tmp_path / image if image == "a.png" else image]


@pytest.mark.parametrize("content", ["<image>what?", [{"type": "image"}, {"type": "text", "text": "what?"}]])
def test_messages_reads_images_kept_beside_the_text(tmp_path: Path, content: Any) -> None:
    sample = read_one(tmp_path, "messages", asked(content, id="a", images=["a.png"], kind="colour"))
    assert sample.messages[0].content == [Mark.IMAGE, "what?"]
    assert (sample.id, sample.images, sample.meta) == ("a", [tmp_path / "a.png"], {"kind": "colour"})


def test_messages_puts_each_image_in_its_own_place(tmp_path: Path) -> None:
    content = [{"type": "text", "text": "<image>"}, {"type": "image", "image": "named.png"}, {"type": "image"}]
    sample = read_one(tmp_path, "messages", asked(content, images=["first.png", "last.png"]))
    assert [Path(str(image)).name for image in sample.images] == ["first.png", "named.png", "last.png"]


@pytest.mark.parametrize("keys", [{}, {"images": None}, {"images": []}])
@pytest.mark.parametrize("system", ["system", "developer"])
def test_messages_reads_text_alone_with_a_system_turn(tmp_path: Path, keys: dict[str, Any], system: str) -> None:
    messages = [{"role": system, "content": "be brief"}, {"role": "user", "content": "hi"}, SAID]
    sample = read_one(tmp_path, "messages", {"messages": messages, **keys})
    assert (sample.messages[0].role, sample.messages[0].text) == ("system", "be brief")
    assert sample.images == []


def test_captions_become_one_sample_each(tmp_path: Path) -> None:
    record = {"id": "c", "image": "a.png", "captions": ["a cat", "a black cat"], "licence": "CC0"}
    samples = read(tmp_path, "captions", json.dumps(record), prompt="\nDescribe.")
    assert [(sample.id, sample.messages[1].text) for sample in samples] == [("c#0", "a cat"), ("c#1", "a black cat")]
    assert all(sample.messages[0].content == [Mark.IMAGE, "\nDescribe."] for sample in samples)
    assert all(sample.meta == {"licence": "CC0"} and sample.images == [tmp_path / "a.png"] for sample in samples)


def test_one_caption_shows_the_bare_image_first(tmp_path: Path) -> None:
    sample = read_one(tmp_path, "captions", {"image": "a.png", "caption": "a cat", "captions": None})
    assert (sample.id, sample.messages[0].content, sample.messages[1].text) == ("data/0#0", [Mark.IMAGE], "a cat")


@pytest.mark.parametrize("kind", GOOD)
def test_ids_are_the_same_in_every_reading(tmp_path: Path, kind: str) -> None:
    records = [{key: value for key, value in GOOD[kind].items() if key != "id"}] * 4
    ids = [[sample.id for sample in read(tmp_path, kind, json.dumps(records))] for _ in range(2)]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 4


BAD: dict[str, list[tuple[str, Any, str]]] = {
    "every": [
        ("cut short", '{"id": "x", ', "not valid JSON"),
        ("no JSON", "hello", "write one JSON object a line"),
        ("no UTF-8", b'{"id": "\xff\xfe"}', "not valid JSON"),
        ("a number without end", '{"id": ' + "9" * 5000 + "}", "not valid JSON"),
        ("a nest without end", '{"id":' * 100_000, "not valid JSON"),
        ("a list", "[1, 2]", "expected a JSON object, found '.1, 2.'"),
        ("a number", "3", "expected a JSON object, found '3'"),
        ("null", "null", "expected a JSON object, found 'None'"),
        ("a string", '"x"', "expected a JSON object, found 'x'"),
        ("an empty object", "{}", "key '.*' is missing: add it"),
    ],
    "llava": [
        ("empty", llava(), "the conversation is empty"),
        ("null conversation", {"conversations": None}, "`conversations` must be a list, found 'None'"),
        ("no answer", llava(("human", "hello")), "the assistant says nothing"),
        ("blank answer", llava(("human", "hello"), ("gpt", " \n")), "the assistant says nothing"),
        ("null words", llava(("human", None), ("gpt", "x")), "`value` must be text, found 'None': write a string"),
        ("number", llava(("human", "x"), ("gpt", 5)), "`value` must be text, found '5'"),
        ("speaker", llava(("robot", "x"), ("gpt", "y")), "unknown speaker 'robot': expected one of human, gpt"),
        ("null speaker", llava((None, "x"), ("gpt", "y")), "unknown speaker None"),
        ("turn", {"conversations": ["hello"]}, "expected a JSON object, found 'hello'"),
        ("no value", {"conversations": [{"from": "human"}]}, "key 'value' is missing: add it"),
        ("more marks", llava(("human", "<image><image>"), ("gpt", "x"), image="a"), "2 <image> .* but 1 images: write"),
        ("fewer marks", llava(("human", "what?"), ("gpt", "x"), image="a"), "0 <image> placeholders but 1 images"),
        ("no image", llava(("human", "<image>"), ("gpt", "x")), "1 <image> placeholders but 0 images"),
        ("null image", llava(("human", "<image>"), ("gpt", "x"), image=[None]), "named 'None': give a path"),
        ("image number", llava(("human", "<image>"), ("gpt", "x"), image=5), "`images` must be a list, found '5'"),
        ("surrogate", llava(("human", "x"), ("gpt", "\ud800")), "is no text in UTF-8"),
    ],
    "messages": [
        ("empty", {"messages": []}, "the conversation is empty"),
        ("null", {"messages": None}, "`messages` must be a list"),
        ("no answer", {"messages": [{"role": "user", "content": "x"}]}, "the assistant says nothing"),
        ("role", {"messages": [{"role": "tool", "content": "x"}, SAID]}, "unknown role 'tool': expected one of system"),
        ("null content", asked(None), "`content` must be a list, found 'None'"),
        ("null text", asked([{"type": "text", "text": None}]), "`text` must be text, found 'None'"),
        ("part", asked([{"type": "audio"}]), "unknown content part 'audio': expected text, image_url or image"),
        ("bare part", asked(["x"]), "expected a JSON object, found 'x'"),
        ("no type", asked([{"text": "x"}]), "key 'type' is missing"),
        ("no url", asked([{"type": "image_url", "image_url": {"uri": "x"}}]), "key 'url' is missing"),
        ("null url", asked([{"type": "image_url", "image_url": {"url": None}}]), "1 <image> .* but 0 images"),
        ("more marks", asked("<image><image>", images=["a"]), "2 <image> placeholders but 1 images"),
        ("fewer marks", asked("x", images=["a"]), "0 <image> placeholders but 1 images: write one placeholder"),
    ],
    "captions": [
        ("no image", {"caption": "x"}, "key 'image' is missing"),
        ("null image", {"image": None, "caption": "x"}, "named 'None': give a path"),
        ("no caption", {"image": "a"}, "key 'caption' is missing"),
        ("null caption", {"image": "a", "caption": None}, "`caption` must be text, found 'None'"),
        ("blank caption", {"image": "a", "caption": ""}, "the assistant says nothing"),
        ("no captions", {"image": "a", "captions": []}, "`captions` is empty"),
        ("one string", {"image": "a", "captions": "a cat"}, "`captions` must be a list, found 'a cat'"),
        ("one of two", {"image": "a", "captions": ["a cat", None]}, "`captions` must be text, found 'None'"),
    ],
    "texts_images": [
        ("no texts", {"images": ["a"]}, "key 'texts' is missing"),
        ("null texts", {"images": ["a"], "texts": None}, "`texts` must be a list"),
        ("empty texts", {"images": ["a"], "texts": []}, "the conversation is empty"),
        ("no answer", {"images": [], "texts": [{"user": "x"}]}, "key 'assistant' is missing"),
        ("null answer", {"images": [], "texts": [{"user": "x", "assistant": None}]}, "`assistant` must be text"),
        ("words", {"images": [], "texts": ["x"]}, "expected a JSON object, found 'x'"),
        ("null image", {"images": [None], "texts": [{"user": "x", "assistant": "y"}]}, "an image is named 'None'"),
        (
            "more marks",
            {"images": ["a"], "texts": [{"user": "<image><image>", "assistant": "y"}]},
            "2 <image> placeholders but 1 images",
        ),
    ],
    "interleaved": [
        ("no images", {"texts": ["x"]}, "key 'images' is missing"),
        ("lengths", {"texts": ["x"], "images": []}, "1 texts and 0 images: lists of one length"),
        ("both", {"texts": ["x"], "images": ["a"]}, "place 0 holds both of text and image"),
        ("neither", {"texts": ["x", None], "images": [None, None]}, "place 1 holds neither of text and image"),
        ("images alone", {"texts": [None], "images": ["a"]}, "the assistant says nothing"),
        ("number", {"texts": [5], "images": [None]}, "`texts` must be text, found '5'"),
        (
            "lost image",
            {"text_list": ["x"], "image_info": [{"image_name": "a", "matched_text_index": 4}]},
            "an image is matched with text 4, but there are 1 texts",
        ),
    ],
}
CASES = [
    pytest.param(kind, bad, told, id=f"{kind}: {name}")
    for kind in CLASSES
    for name, bad, told in [*BAD["every"], *BAD[kind]]
]


@pytest.mark.parametrize(("kind", "bad", "told"), CASES)
@pytest.mark.parametrize("row", [0, 1])
def test_a_bad_record_is_one_named_error_between_good_ones(
    tmp_path: Path, kind: str, bad: Any, told: str, row: int
) -> None:
    line = bad if isinstance(bad, bytes) else (bad if isinstance(bad, str) else json.dumps(bad)).encode()
    lines = [json.dumps(GOOD[kind]).encode()] * 2
    items = read(tmp_path, kind, b"\n".join([*lines[:row], line, *lines[row:]]))
    assert [isinstance(item, Sample) for item in items] == [i != row for i in range(3)]
    with pytest.raises(ValueError, match=told) as caught:
        raise items[row]
    assert str(caught.value).startswith(f"{tmp_path / 'data.jsonl'}, row {row}: ")


@pytest.mark.parametrize("kind", CLASSES)
def test_a_missing_file_is_told_with_the_flag(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=r"no data file .*none\.json: there is no file, folder or match"):
        list(CLASSES[kind](path=tmp_path / "none.json").read())


def test_a_list_that_was_cut_short_stops_with_the_files_name(tmp_path: Path) -> None:
    whole = json.dumps([GOOD["llava"]] * 3)
    with pytest.raises(ValueError, match=r"cut\.json is no whole JSON list .*download it again"):
        read(tmp_path, "llava", whole[:-20], name="cut.json")


# ---------------------------------------------------------------- no format named


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("layout", ["lines", "list", "parquet", "tar"])
def test_a_format_is_recognised_by_its_records(tmp_path: Path, kind: str, layout: str) -> None:
    names = {"lines": "a.jsonl", "list": "a.json", "parquet": "a.parquet", "tar": "a.tar"}
    path, records = tmp_path / names[layout], [{**GOOD[kind], "id": str(i)} for i in range(3)]
    if layout == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif layout == "tar":
        shard(path, [(f"{record['id']}.json", json.dumps(record).encode()) for record in records])
    else:
        path.write_text(json.dumps(records) if layout == "list" else "\n".join(map(json.dumps, records)))
    source = TypeAdapter(SourceConfig).validate_python({"path": str(path)})
    assert isinstance(source, AutoSource)
    assert type(source.chosen()) is CLASSES[kind]
    found = list(source.scan(0))
    assert [sample for _, sample in found] == list(CLASSES[kind](path=path).read())
    random.Random(0).shuffle(found)
    again = pickle.loads(pickle.dumps(source))
    assert all(again.fetch(place) == sample for place, sample in found)


def test_bad_records_do_not_hide_the_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n{}\n" + json.dumps(GOOD["llava"]))
    assert [type(item) for item in AutoSource(path=tmp_path / "a.jsonl").read()] == [ValueError, ValueError, Sample]


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([{"question": "x", "answer": "y"}], "is of no known format: its records have the keys question, answer"),
        ([[1, 2]], r"is of no known format: .* keys \(none\)"),
        ([{**GOOD["llava"], **GOOD["messages"]}], r"fits several formats \(llava, messages\)"),
        ([GOOD["llava"], GOOD["captions"]], "is of no known format: .*conversations.*caption"),
    ],
)
def test_what_fits_no_format_or_several_is_told_with_its_keys(tmp_path: Path, records: list[Any], told: str) -> None:
    json_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError, match=rf"a\.jsonl {told}.* Set `format` to one of"):
        list(AutoSource(path=tmp_path / "a.jsonl").read())


def test_a_file_without_records_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a\.jsonl holds no records"):
        list(AutoSource(path=tmp_path / "a.jsonl").read())


def test_a_named_format_wins(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD["llava"]))
    source = TypeAdapter(SourceConfig).validate_python({"path": tmp_path / "a.jsonl", "format": "messages"})
    [bad] = source.read()
    assert "the key 'messages' is missing: add it, or check that `format` is this file's" in str(bad)


def test_sources_survive_the_saved_config(tmp_path: Path) -> None:
    adapter = TypeAdapter(list[SourceConfig])
    raw = [
        {"path": "a.json"},
        {"path": "s3://b/a", "format": "captions", "text": {"weights": {"alt": 1.0}}, "image_dir": "s3://b/i"},
        {"path": "hub:a/b", "format": "texts_images", "split": "train", "min_rating": {"relevance": 3}},
    ]
    sources = adapter.validate_python(raw)
    assert adapter.validate_python(adapter.dump_python(sources, mode="json")) == sources
    assert [source.path for source in sources] == [Path("a.json"), "s3://b/a", "hub:a/b"]
