"""Each format in the variants that its public users write."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from families import FAMILIES
from mllm.data import chat
from mllm.data.formats import SourceConfig
from mllm.data.formats.auto import AutoSource
from mllm.data.formats.captions import CaptionsSource, Kinds
from mllm.data.formats.coco import CocoSource
from mllm.data.formats.fields import FieldsSource
from mllm.data.formats.messages import MessagesSource
from mllm.data.formats.source import Filtered
from mllm.data.formats.texts_images import MinRating, TextsImagesSource
from mllm.data.images import open_image
from mllm.types import IGNORE_INDEX, Mark, Sample
from records import DATA_URI, GOOD, asked, llava, read_one
from writers import img2dataset, json_lines, png, shard, table


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))


# ---------------------------------------------------------------- LLaVA's and ShareGPT's variants


@pytest.mark.parametrize(
    ("human", "machine"), [("human", "gpt"), ("user", "assistant"), ("human", "bot"), ("user", "chatgpt")]
)
@pytest.mark.parametrize(("who", "said"), [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("key", ["conversations", "conversation"])
def test_sharegpt_is_read_whatever_its_keys_and_speakers(
    tmp_path: Path, human: str, machine: str, who: str, said: str, key: str
) -> None:
    turns = [{who: "system", said: "be brief"}, {who: human, said: "<image>what?"}, {who: machine, said: "red"}]
    sample = read_one(tmp_path, "llava", {key: turns, "image": "a.png", "model": "x"})
    assert [(message.role, message.text) for message in sample.messages] == [
        ("system", "be brief"),
        ("user", "what?"),
        ("assistant", "red"),
    ]
    assert sample.meta == {"model": "x"}


def test_sharegpt_keeps_the_system_prompt_beside_its_turns(tmp_path: Path) -> None:
    sample = read_one(tmp_path, "llava", llava(("human", "x"), ("gpt", "y"), system="be brief"))
    assert [message.role for message in sample.messages] == ["system", "user", "assistant"]
    plain = read_one(tmp_path, "llava", llava(("human", "x"), ("gpt", "y"), system=""))
    assert [message.role for message in plain.messages] == ["user", "assistant"]


def test_bare_keeps_of_the_user_only_the_image(tmp_path: Path) -> None:
    record = llava(("human", "Describe it.\n<image>"), ("gpt", "a cat"), image="a.png")
    assert read_one(tmp_path, "llava", record, bare=True).messages[0].content == [Mark.IMAGE]


def test_llava_is_read_from_a_table_with_its_images(tmp_path: Path) -> None:
    rows = [llava(("human", "<image>what?"), ("gpt", "red"), id="1", image={"bytes": PICTURE, "path": "1.png"})]
    rows.append(llava(("human", "hello"), ("gpt", "hi"), id="2", image=None))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    assert [sample.images for sample in AutoSource(path=tmp_path).read()] == [[PICTURE], []]


PICTURE = png()


@pytest.mark.parametrize(
    ("named", "image"),
    [
        ("a.png", "FOLDER/a.png"),
        ("/data/a.png", Path("/data/a.png")),
        ("s3://b/a.png", "s3://b/a.png"),
        ("file:///data/a.png", "file:///data/a.png"),
        (DATA_URI, DATA_URI),
        (PICTURE, PICTURE),
        ({"bytes": PICTURE, "path": "a.png"}, PICTURE),
        ({"bytes": None, "path": "a.png"}, "FOLDER/a.png"),
        ({"bytes": None, "path": None}, ValueError),
        (b"", ValueError),
    ],
)
def test_an_image_is_a_name_or_bytes_or_what_datasets_keeps(tmp_path: Path, named: Any, image: Any) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if isinstance(named, dict) else None
    pq.write_table(pa.table({"image": pa.array([named], kind), "caption": ["a cat"]}), tmp_path / "a.parquet")
    [sample] = CaptionsSource(path=tmp_path / "a.parquet").read()
    if image is ValueError:
        assert "an image is named" in str(sample)
    else:
        assert sample.images == [tmp_path / "a.png" if image == "FOLDER/a.png" else image]


def test_an_image_in_a_zip_is_named_behind_its_archive(tmp_path: Path) -> None:
    (tmp_path / "pics.zip").touch()
    sample = read_one(tmp_path, "captions", GOOD["captions"], image_dir=tmp_path / "pics.zip")
    assert sample.images == [f"{tmp_path / 'pics.zip'}::a.png"]


# ---------------------------------------------------------------- messages' variants


def test_messages_are_read_from_a_table_that_fills_every_key_of_a_part(tmp_path: Path) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    answer = [{"type": "text", "text": "red"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    rows = [{"messages": messages, "images": [{"bytes": PICTURE, "path": None}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    [sample] = MessagesSource(path=tmp_path / "a.parquet").read()
    assert [message.content for message in sample.messages] == [[Mark.IMAGE, "what?"], ["red"]]
    assert sample.images == [PICTURE]


def test_messages_with_bytes_in_a_part(tmp_path: Path) -> None:
    rows = [asked([{"type": "image", "image": {"bytes": PICTURE, "path": None}}])]
    rows[0]["messages"][1] = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    [sample] = MessagesSource(path=tmp_path / "a.parquet").read()
    assert sample.images == [PICTURE]


def test_messages_with_one_image_beside_them(tmp_path: Path) -> None:
    assert read_one(tmp_path, "messages", asked("<image>?", image="a.png")).images == [tmp_path / "a.png"]


def test_messages_and_their_images_are_read_from_a_tar(tmp_path: Path) -> None:
    blue = png("blue")
    record = asked("<image> or <image>?", id="x", images=["1.png", "0.png"])
    members = [("00.0.png", PICTURE), ("00.1.png", blue), ("00.json", json.dumps(record).encode())]
    [sample] = MessagesSource(path=shard(tmp_path / "s.tar", members)).read()
    assert (sample.id, sample.images, sample.meta) == ("x", [blue, PICTURE], {})


# ---------------------------------------------------------------- captions' variants

IMAGE_NAMES = [
    "image",
    "image_path",
    "img_path",
    "filepath",
    "file_name",
    "filename",
    "path",
    "image_url",
    "url",
    "URL",
]
CAPTION_NAMES = ["caption", "text", "TEXT", "alt", "alt_text", "title", "description"]


@pytest.mark.parametrize(
    ("image", "caption"),
    [*((name, "caption") for name in IMAGE_NAMES), *(("image", name) for name in CAPTION_NAMES)],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_captions_are_found_under_their_usual_names(tmp_path: Path, image: str, caption: str, suffix: str) -> None:
    path, rows = tmp_path / f"data{suffix}", [{image: "https://x.y/a.png", caption: "a cat", "licence": "CC0"}]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        (json_lines if suffix == ".jsonl" else table)(path, rows)
    [sample] = AutoSource(path=path).read()
    assert (sample.images, sample.messages[1].text) == (["https://x.y/a.png"], "a cat")
    assert sample.meta == {"licence": "CC0"}


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_shards_of_img2dataset_are_captions(tmp_path: Path, kind: str) -> None:
    samples = list(AutoSource(path=img2dataset(tmp_path / "00007.tar", ["a cat", "a dog"], kind)).read())
    assert [sample.id for sample in samples] == ["00007/000070000#0", "00007/000070001#0"]
    assert [sample.messages[1].text for sample in samples] == ["a cat", "a dog"]
    assert all(open_image(sample.images[0]).size == (8, 6) for sample in samples)
    assert samples[0].meta["url"] == "https://x.y/000070000.jpg"
    assert not any(isinstance(value, bytes) for value in samples[0].meta.values())


def test_a_tar_without_json_is_captions(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", [("a.jpg", PICTURE), ("a.caption", b"a cat")])
    [sample] = AutoSource(path=path).read()
    assert (sample.id, sample.images, sample.messages[1].text) == ("s/a#0", [PICTURE], "a cat")


def test_a_failed_download_of_img2dataset_is_a_fault_and_no_request(tmp_path: Path) -> None:
    rows = [{"jpg": PICTURE, "url": "https://x.y", "caption": "a"}, {"jpg": None, "url": "https://x.z", "caption": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    good, bad = AutoSource(path=tmp_path / "a.parquet").read()
    assert good.images == [PICTURE]
    assert "row 1: an image is named 'None'" in str(bad)


KINDS = Kinds(weights={"alt": 1, "dense": 2.5, "never": 0})


def test_kinds_of_caption_are_samples_of_one_record(tmp_path: Path) -> None:
    record = {"id": "r", "image": "a.png", "alt": "cat", "dense": "a black cat", "never": "x", "note": 1}
    json_lines(tmp_path / "a.jsonl", [record, {**record, "id": "s", "alt": " "}])
    source = CaptionsSource(path=tmp_path / "a.jsonl", text=KINDS)
    found = list(source.scan(0))
    assert [(sample.id, sample.variant) for _, sample in found] == [
        ("r#alt", "alt"),
        ("r#dense", "dense"),
        ("s#dense", "dense"),
    ]
    assert [(place.row, place.part) for place, _ in found] == [(0, 0), (0, 1), (1, 0)]
    assert source.kinds() == {"alt": 1, "dense": 2.5}
    assert found[1][1].messages[1].text == "a black cat"
    assert all(source.fetch(place) == sample for place, sample in found)


def test_a_record_without_any_of_the_kinds_is_named(tmp_path: Path) -> None:
    json_lines(tmp_path / "a.jsonl", [{"image": "a.png", "caption": "a cat"}])
    [bad] = CaptionsSource(path=tmp_path / "a.jsonl", text=KINDS).read()
    assert "row 0: no caption of the kinds alt, dense: it has image, caption" in str(bad)


@pytest.mark.parametrize("weights", [{}, {"alt": 0}, {"alt": -1}])
def test_kinds_without_weight_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="alt"):
        TypeAdapter(SourceConfig).validate_python({"format": "captions", "path": "x", "text": {"weights": weights}})


# ---------------------------------------------------------------- texts with images


def test_images_stand_before_the_first_question(tmp_path: Path) -> None:
    texts = [{"user": "what?", "assistant": "red", "source": "x"}, {"user": "and?", "assistant": "blue", "source": "x"}]
    sample = read_one(tmp_path, "texts_images", {"images": ["a.png", "b.png"], "texts": texts, "source": "ai2d"})
    assert [message.content for message in sample.messages] == [
        [Mark.IMAGE, Mark.IMAGE, "what?"],
        ["red"],
        ["and?"],
        ["blue"],
    ]
    assert sample.meta == {"source": "ai2d"}


def test_images_stand_where_the_words_say(tmp_path: Path) -> None:
    texts = [{"user": "what?", "assistant": "red"}, {"user": "and <image>?", "assistant": "blue"}]
    sample = read_one(tmp_path, "texts_images", {"images": ["a.png"], "texts": texts})
    assert [message.num_images for message in sample.messages] == [0, 0, 1, 0]


@pytest.mark.parametrize("images", [None, []])
def test_texts_without_images_are_text_alone(tmp_path: Path, images: Any) -> None:
    sample = read_one(tmp_path, "texts_images", {**GOOD["texts_images"], "images": images})
    assert (sample.images, sample.messages[0].content) == ([], ["what?"])


def test_low_ratings_are_left_out_with_their_cause_and_are_no_faults(tmp_path: Path) -> None:
    ratings = [(5, 5), (2, 5), (5, None), (3, 3)]
    rows = [{**GOOD["texts_images"], "relevance_min": one, "formatting_min": two} for one, two in ratings]
    json_lines(tmp_path / "a.jsonl", [*rows, GOOD["texts_images"]])
    every = list(TextsImagesSource(path=tmp_path / "a.jsonl").read())
    assert all(isinstance(item, Sample) for item in every)
    least = MinRating(relevance=3, formatting=2)
    items = list(TextsImagesSource(path=tmp_path / "a.jsonl", min_rating=least).read())
    assert [type(item) for item in items] == [Sample, Filtered, Filtered, Sample, ValueError]
    assert "row 1: left out: relevance is rated 2, min_rating asks for 3" in str(items[1])
    assert "the key 'relevance_min' is missing" in str(items[4])


# ---------------------------------------------------------------- interleaved documents


def test_a_document_is_said_whole_with_its_images_in_place(tmp_path: Path) -> None:
    texts = [None, "a cat", "and", None, "a dog <image>"]
    images = ["https://x.y/0", None, None, "1.png", None]
    sample = read_one(tmp_path, "interleaved", {"texts": texts, "images": images, "general_metadata": "{}"})
    assert [message.role for message in sample.messages] == ["user", "assistant"]
    assert sample.messages[1].content == [Mark.IMAGE, "a cat\n\nand", Mark.IMAGE, "a dog "]
    assert sample.images == ["https://x.y/0", tmp_path / "1.png"]


def test_a_document_of_mmc4_has_each_image_before_its_sentence(tmp_path: Path) -> None:
    info = [
        {"image_name": "b.png", "raw_url": "https://x.y/b", "matched_text_index": 1, "matched_sim": 0.3},
        {"raw_url": "https://x.y/a", "matched_text_index": 0},
    ]
    sample = read_one(tmp_path, "interleaved", {"text_list": ["a", "b"], "image_info": info, "url": "https://x.y"})
    assert sample.messages[1].content == [Mark.IMAGE, "a", Mark.IMAGE, "b"]
    assert sample.images == ["https://x.y/a", tmp_path / "b.png"]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_words_of_a_document_are_learned_under_every_template(tmp_path: Path, family: str) -> None:
    sample = read_one(tmp_path, "interleaved", GOOD["interleaved"])
    tokenizer = FAMILIES[family].tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chat.ensure_template(tokenizer)
    ids, labels = chat.encode(tokenizer, sample.messages)
    said = tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX])
    assert said.startswith("a circle<image>that is red")


# ---------------------------------------------------------------- any table


def fields(folder: Path, record: Any, **templates: Any) -> Any:
    (folder / "data.json").write_text(json.dumps([record]))
    [item] = FieldsSource(path=folder / "data.json", **templates).read()
    return item


def test_templates_make_a_conversation_of_any_table(tmp_path: Path) -> None:
    record = {"dir": 3, "name": "x", "q": {"en": ["what?"]}, "a": 0.5, "id": 7}
    sample = fields(
        tmp_path, record, image=["{dir}/{name}-0.png", "b.png"], prompt="{q[en][0]} Say.", answer="{a:.2f}", system="S"
    )
    assert [(m.role, m.content) for m in sample.messages] == [
        ("system", ["S"]),
        ("user", [Mark.IMAGE, Mark.IMAGE, "what? Say."]),
        ("assistant", ["0.50"]),
    ]
    assert (sample.id, sample.images) == ("7", [tmp_path / "3/x-0.png", tmp_path / "b.png"])


def test_templates_reach_the_places_of_a_list_and_the_images_place(tmp_path: Path) -> None:
    sample = fields(tmp_path, ["what?", "red", 4], image="{2}.png", prompt="{0} <image>", answer="{1}")
    assert (sample.messages[0].content, sample.images) == (["what? ", Mark.IMAGE], [tmp_path / "4.png"])


def test_a_template_that_is_one_column_may_hold_bytes(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", [("1.png", PICTURE), ("1.cls", b"5")])
    [sample] = FieldsSource(path=path, image="{png}", prompt="Which digit?", answer="{cls}").read()
    assert (sample.images, sample.messages[1].text) == ([PICTURE], "5")


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"a": None}, "a is empty"),
        ({"b": "x"}, r"key 'a' is missing.*\(it has: b\)"),
        ({"a": ["x"]}, "a template needs words or a number"),
        ({"a": ""}, "the assistant says nothing"),
        ({"a": "<image>"}, "the assistant says nothing|placeholders but"),
        (["x"], "key 'a' is missing"),
        ("x", "expected an object or a list, found 'x'"),
    ],
)
def test_a_hole_in_a_table_is_named(tmp_path: Path, record: Any, told: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.json, row 0: .*({told})"):
        raise fields(tmp_path, record, answer="{a}")


def test_fields_without_an_answer_are_refused() -> None:
    with pytest.raises(ValidationError, match="needs `answer`"):
        TypeAdapter(SourceConfig).validate_python({"format": "fields", "path": "x"})


# ---------------------------------------------------------------- COCO

COCO = {
    "info": {"year": 2017},
    "images": [{"id": 9, "file_name": "9.jpg", "height": 3}, {"id": 4, "file_name": "4.jpg"}],
    "licenses": [],
    "annotations": [
        {"image_id": 4, "id": 1, "caption": "a café"},
        {"image_id": 9, "id": 2, "caption": "a dog"},
        {"image_id": 5, "id": 3, "caption": "lost"},
        {"image_id": 4, "id": 4},
    ],
}


@pytest.mark.parametrize("order", [list(COCO), list(COCO)[::-1]])
@pytest.mark.parametrize("indent", [None, 2])
def test_coco_gives_one_sample_a_caption(tmp_path: Path, order: list[str], indent: int | None) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({key: COCO[key] for key in order}, indent=indent, ensure_ascii=False))
    source = AutoSource(path=path, image_dir=tmp_path / "images")
    found = list(source.scan(0))
    items = [item for _, item in found]
    assert [(item.id, item.messages[1].text, item.images) for item in items[:2]] == [
        ("4#1", "a café", [tmp_path / "images/4.jpg"]),
        ("9#2", "a dog", [tmp_path / "images/9.jpg"]),
    ]
    assert "row 2: the annotation is of image 5, which is not among the 2 `images`" in str(items[2])
    assert "row 3: the key 'caption' is missing" in str(items[3])
    assert [source.fetch(place) for place, _ in found[1::-1]] == items[1::-1]


@pytest.mark.parametrize("text", ["{}", '{"images": []}', '{"images": [{"id": 1', "[]", '{"images": {}}'])
def test_a_file_that_is_not_cocos_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json (has no `|is no whole COCO file)"):
        list(CocoSource(path=tmp_path / "a.json").read())
