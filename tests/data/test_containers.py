"""Records come back whole and in order, each at its place; a broken file or record is told, never passed over."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import pickle
import random
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mllm.data.containers import json_list, open_container
from mllm.data.containers import tar as tar_records
from mllm.data.copies import unpacked
from mllm.data.formats.auto import AutoSource
from mllm.data.formats.captions import CaptionsSource
from mllm.data.formats.fields import FieldsSource
from writers import CONTAINERS, img2dataset, json_lines, parquet, png, shard

FEW = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MANY = settings(FEW, max_examples=100)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))


def scan(path: Path, **options: Any) -> list[Any]:
    return [record for _, _, record in open_container(path, **options).scan()]


@pytest.mark.parametrize("kind", CONTAINERS)
@FEW
@given(rows=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_every_container_gives_its_records_in_order_and_at_random(
    tmp_path: Path, kind: str, rows: list[tuple[str, str]], seed: int
) -> None:
    name, write = CONTAINERS[kind]
    records = [{"caption": caption, "note": note} for caption, note in rows]
    write(tmp_path / name, records)
    path = unpacked(tmp_path / name)
    found = list(open_container(path).scan())
    read = [{key: record[key] for key in ("caption", "note")} for _, _, record in found]
    assert read == records
    random.Random(seed).shuffle(found)
    again = open_container(path)
    assert all(again.fetch(start, size) == record for start, size, record in found)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_source_fetches_what_it_scanned_from_every_container(tmp_path: Path, kind: str) -> None:
    name, write = CONTAINERS[kind]
    write(tmp_path / name, [{"image": f"{i}.png", "caption": "" if i == 3 else f"caption {i}"} for i in range(8)])
    source = CaptionsSource(path=tmp_path / name)
    found = list(source.scan(0))
    assert [place.row for place, _ in found] == list(range(8))
    assert [row for row, (_, item) in enumerate(found) if isinstance(item, ValueError)] == [3]
    assert str(found[3][1]).startswith(f"{tmp_path / name}, row 3: ")
    good = [(place, sample) for place, sample in found if not isinstance(sample, ValueError)]
    assert all(source.fetch(place) == sample for place, sample in reversed(good))
    with pytest.raises(ValueError, match=", row 3: "):
        source.fetch(found[3][0])


@pytest.mark.parametrize("kind", ["JSON list", "JSON lines", "CSV", "Parquet", "Arrow stream", "tar"])
def test_a_record_that_is_gone_is_an_error_with_file_and_row(tmp_path: Path, kind: str) -> None:
    name, write = CONTAINERS[kind]
    records = [{"image": f"{i}.png", "caption": f"caption {i}"} for i in range(30)]
    write(tmp_path / name, records)
    places = [place for place, _ in CaptionsSource(path=tmp_path / name).scan(0)]
    (tmp_path / name).unlink()
    write(tmp_path / name, records[:2])
    with pytest.raises(ValueError, match=rf"{name}, row 29: .*index"):
        CaptionsSource(path=tmp_path / name).fetch(places[29])


# ---------------------------------------------------------------- JSON


@MANY
@given(values=st.lists(VALUES, max_size=6), indent=st.sampled_from([None, 1]), ascii=st.booleans())
def test_a_json_list_read_through_a_narrow_window_is_the_list_that_json_reads(
    tmp_path: Path, values: list[Any], indent: int | None, ascii: bool
) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "CHUNK", 7)
        found = list(json_list.JsonList(path).scan())
    data = path.read_bytes()
    assert [value for _, _, value in found] == values
    assert [json.loads(data[start : start + size]) for start, size, _ in found] == values


def test_a_list_cut_anywhere_is_told_as_no_whole_list(tmp_path: Path) -> None:
    whole = json.dumps([{"caption": 'né \\ "x"', "n": -1.5e3}, {"ok": True}], ensure_ascii=False).encode()
    for end in range(1, len(whole)):
        path = tmp_path / "cut.json"
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"cut\.json is no whole JSON list"):
            list(json_list.JsonList(path).scan())


@pytest.mark.parametrize("rest", ["x", ",", "[1]", "]"])
def test_what_stands_behind_a_list_is_told(tmp_path: Path, rest: str) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}]' + rest)
    with pytest.raises(ValueError, match="stands behind the list"):
        scan(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["[1,]", "[,1]", "[1 2]", "[{]"])
def test_a_list_with_a_slip_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="is no whole JSON list"):
        scan(tmp_path / "a.json")


def test_bytes_that_are_no_utf8_spoil_one_element_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('[{"a": "é"}, {"a": "'.encode() + b'\xff"}, {"a": "\xc3\xa9"}]')
    first, spoilt, last = scan(tmp_path / "a.json")
    assert first == last == {"a": "é"}
    assert "not valid JSON" in str(spoilt)


def test_an_error_in_a_long_list_is_found_without_reading_on(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(json_list, "CHUNK", 64)
    (tmp_path / "a.json").write_text('[{"a": 1, "b" 2}' + ', {"a": 1}' * 10_000 + "]")
    with (tmp_path / "a.json").open("rb") as file:
        text = json_list.JsonText(file)
        text.expect("[")
        with pytest.raises(ValueError, match="in the value at byte 1"):
            list(text.elements())
        assert file.tell() < 1000


def test_a_list_of_many_records_is_never_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"caption": "x" * 900}] * 12_000))
    tracemalloc.start()
    count = sum(1 for _ in json_list.JsonList(path).scan())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (count, path.stat().st_size > 10 * 2**20, peak < 6 * 2**20) == (12_000, True, True)


def test_lines_of_which_the_first_is_a_list_are_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["what?", "red", 0]\n["and?", "blue", 1]\n')
    assert scan(tmp_path / "a.json") == [["what?", "red", 0], ["and?", "blue", 1]]


# ---------------------------------------------------------------- CSV and TSV


def test_cells_may_hold_line_ends_quotes_commas_and_whole_images(tmp_path: Path) -> None:
    long = "A" * 200_000
    (tmp_path / "a.csv").write_text(f'image,caption\na.png,"say ""hi"",\nthen go"\n\nb.png,{long}\nc.png,\n')
    assert scan(tmp_path / "a.csv") == [
        {"image": "a.png", "caption": 'say "hi",\nthen go'},
        {"image": "b.png", "caption": long},
        {"image": "c.png", "caption": None},
    ]


def test_a_table_without_names_gets_them_from_columns(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("a dog\thttps://x.y/1\na cat\thttps://x.y/2\n")
    source = CaptionsSource(path=tmp_path / "a.tsv", columns=["caption", "url"])
    found = [(place, sample) for place, sample in source.scan(0)]
    assert [sample.images for _, sample in found] == [["https://x.y/1"], ["https://x.y/2"]]
    assert source.fetch(found[1][0]) == found[1][1]


@pytest.mark.parametrize(
    ("name", "delimiter"),
    [("openclip.csv", "\t"), ("german.csv", ";"), ("flickr30k.csv", "|"), ("named.tsv", ","), ("plain.csv", ",")],
)
def test_a_table_is_read_by_the_delimiter_that_it_has(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = [["filepath", "title"], ["a.png", "a cat"], ["b.png", "a dog"]]
    (tmp_path / name).write_text("".join(delimiter.join(row) + "\n" for row in rows))
    source = AutoSource(path=tmp_path / name)
    found = list(source.scan(0))
    assert [sample.messages[1].text for _, sample in found] == ["a cat", "a dog"]
    assert source.fetch(found[1][0]) == found[1][1]


def test_a_comma_in_the_only_column_of_names_is_no_delimiter_of_a_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("image\tcaption, in words\na.png\tone, two\n")
    assert scan(tmp_path / "a.tsv") == [{"image": "a.png", "caption, in words": "one, two"}]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a.png,x,y", "3 cells, but there are 2 columns: image, caption"),
        ("a.png", "1 cells, but there are 2 columns"),
        ('a.png,"x" y', "no row of cells .* double those in it"),
        ("a.png,\xff", "is no text in UTF-8"),
    ],
)
def test_a_bad_line_of_a_table_is_one_named_error(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "a.csv").write_bytes(f"image,caption\nb.png,good\n{line}\nc.png,good\n".encode("latin-1"))
    first, bad, last = CaptionsSource(path=tmp_path / "a.csv").read()
    assert not isinstance(first, ValueError)
    assert not isinstance(last, ValueError)
    with pytest.raises(ValueError, match=rf"a\.csv, row 1: .*{told}"):
        raise bad


def test_a_quote_that_is_never_closed_stops_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('image,caption\na.png,"x\nb.png,y\n')
    with pytest.raises(ValueError, match=r"a\.csv: the quote that opens in the row at byte 14 is never closed"):
        scan(tmp_path / "a.csv")


@pytest.mark.parametrize("head", ["", "image,image\n", '"image,caption\n'])
def test_a_table_without_a_line_of_names_is_told(tmp_path: Path, head: str) -> None:
    (tmp_path / "a.csv").write_text(head)
    with pytest.raises(ValueError, match=r"a\.csv"):
        scan(tmp_path / "a.csv")


# ---------------------------------------------------------------- Arrow and Parquet


def test_a_fetch_from_parquet_does_not_lay_it_out_again(tmp_path: Path, monkeypatch: Any) -> None:
    parquet(tmp_path / "a.parquet", [{"n": i} for i in range(700)], rows=90)
    assert [record["n"] for record in scan(tmp_path / "a.parquet")] == list(range(700))
    monkeypatch.setattr(pq, "ParquetFile", None)
    assert open_container(tmp_path / "a.parquet").fetch(699, 0) == {"n": 699}


def test_categories_of_parquet_are_words(tmp_path: Path) -> None:
    words = pa.chunked_array([pa.array(w).dictionary_encode() for w in (["a", "b"], ["c", None])])
    pq.write_table(pa.table({"w": words}), tmp_path / "a.parquet", row_group_size=1)
    assert [record["w"] for record in scan(tmp_path / "a.parquet")] == ["a", "b", "c", None]


def test_a_cache_without_room_is_told_before_it_is_full(tmp_path: Path, monkeypatch: Any) -> None:
    parquet(tmp_path / "a.parquet", [{"n": 1}])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 3}))
    with pytest.raises(ValueError, match=r"a\.parquet needs .* GiB in the cache .*MLLM_CACHE"):
        scan(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", ["Parquet", "Arrow file", "Arrow stream"])
@pytest.mark.parametrize("keep", [0, 3, 40, 0.5, 0.9])
def test_a_table_cut_short_is_told(tmp_path: Path, kind: str, keep: float) -> None:
    name, write = CONTAINERS[kind]
    write(tmp_path / name, [{"n": "x" * 50}] * 9)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(keep if keep >= 1 else keep * len(whole))])
    with pytest.raises(ValueError, match=rf"{name} is no whole .*download it again"):
        scan(tmp_path / name)


# ---------------------------------------------------------------- tar


def test_members_with_one_key_are_one_record(tmp_path: Path) -> None:
    picture = png()
    members = [("./a/01.v.jpg", picture), ("a/01.JSON", b'{"width": 8}'), ("a/01.txt", b"red"), ("a/02.cls", b"7")]
    path = shard(tmp_path / "s.tar", [("README", b"no record"), (".hidden.txt", b""), *members])
    assert scan(path) == [
        {"__key__": "a/01", "width": 8, "v.jpg": picture, "txt": "red", "image": picture},
        {"__key__": "a/02", "cls": "7"},
    ]


def test_a_member_may_be_compressed(tmp_path: Path) -> None:
    assert scan(shard(tmp_path / "s.tar", [("1.txt.gz", gzip.compress(b"hello"))])) == [
        {"__key__": "1", "txt": "hello"}
    ]


def test_images_are_the_members_that_the_json_names_or_all_pictures(tmp_path: Path) -> None:
    one, two = png("red"), png("blue")
    pictures = [("1.0.png", one), ("1.1.png", two)]
    named = json.dumps({"images": ["1.png", None, "0.png", "https://x.y"]}).encode()
    [record] = scan(shard(tmp_path / "a.tar", [*pictures, ("1.json", named)]))
    assert record["images"] == [two, None, one, "https://x.y"]
    [record] = scan(shard(tmp_path / "b.tar", [*pictures, ("1.json", b'{"image": "elsewhere.jpg"}')]))
    assert record["images"] == [one, two]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_are_read_in_every_dialect(tmp_path: Path, form: int) -> None:
    name = f"{'folder/' * 13}{'k' * 60}"
    path = shard(tmp_path / "s.tar", [(f"{name}.txt", b"one"), (f"{name}.cls", b"1"), ("é.txt", b"two")], form)
    assert [record["__key__"] for record in scan(path)] == [name, "é"]
    found = list(open_container(path).scan())
    assert all(open_container(path).fetch(start, size) == record for start, size, record in found)


def test_ordinary_members_are_read_the_short_way_as_the_long_way(tmp_path: Path) -> None:
    path = img2dataset(tmp_path / "00000.tar", ["a cat", "é"])
    pieces = [path.read_bytes()[start : start + size] for start, size, _ in open_container(path).scan()]
    assert len(pieces) == 2
    assert all(tar_records.plain_members(piece) == tar_records.all_members(piece) != [] for piece in pieces)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([("1.txt", b"a"), ("1.txt", b"b")], r"1 has two members \.txt"),
        ([("1.json", b"{")], r"1\.json: not valid JSON"),
        ([("1.txt", b"\xff")], "1: .*utf-8"),
        ([("1.txt.gz", b"no gzip")], "1: Not a gzipped file"),
    ],
)
def test_a_bad_member_is_one_error(tmp_path: Path, members: list[tuple[str, bytes]], told: str) -> None:
    path = shard(tmp_path / "s.tar", [("0.txt", b"good"), *members, ("2.txt", b"good")])
    first, bad, last = FieldsSource(path=path, answer="{txt}").read()
    assert [first.id, last.id] == ["s/0", "s/2"]
    with pytest.raises(ValueError, match=rf"s\.tar, row 1: {told}"):
        raise bad


def test_an_archive_cut_anywhere_is_told(tmp_path: Path) -> None:
    whole = shard(tmp_path / "s.tar", [(f"{i}.txt", bytes(600)) for i in range(3)]).read_bytes()
    for end in (0, 100, 512, 700, 1024, 1536, 1600, 2048, 3000, 3500, 4100):
        (tmp_path / "cut.tar").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"cut\.tar"):
            scan(tmp_path / "cut.tar")


@pytest.mark.parametrize("place", [0, 1536, 3072])
def test_an_archive_with_a_spoilt_header_is_told(tmp_path: Path, place: int) -> None:
    data = bytearray(shard(tmp_path / "s.tar", [(f"{i}.txt", bytes(600)) for i in range(3)]).read_bytes())
    data[place : place + 4] = b"\xff\xfe\xfd\xfc"
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"s\.tar is (broken at byte|no whole tar)"):
        scan(tmp_path / "s.tar")


def test_an_archive_behind_another_is_told(tmp_path: Path) -> None:
    shards = [shard(tmp_path / f"{i}.tar", [(f"{i}.txt", b"x")]).read_bytes() for i in range(2)]
    (tmp_path / "s.tar").write_bytes(b"".join(shards))
    with pytest.raises(ValueError, match=r"s\.tar is broken at byte 1024"):
        scan(tmp_path / "s.tar")


def test_an_archive_without_records_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no members with names such as"):
        scan(shard(tmp_path / "s.tar", [("README", b"x")]))


# ---------------------------------------------------------------- many processes


def fetch_all(job: tuple[CaptionsSource, list[Any]]) -> list[str]:
    source, places = job
    return [source.fetch(place).messages[1].text for place in places]


@pytest.mark.parametrize("kind", ["JSON list", "CSV", "Parquet", "tar"])
def test_forked_and_pickled_sources_fetch_side_by_side(tmp_path: Path, kind: str) -> None:
    name, write = CONTAINERS[kind]
    write(tmp_path / name, [{"image": "a.png", "caption": f"caption {i}"} for i in range(200)])
    source = CaptionsSource(path=tmp_path / name)
    places = [place for place, _ in source.scan(0)]
    source.fetch(places[0])
    assert pickle.loads(pickle.dumps(source)).kept().keys() == {"files", "process"}
    with multiprocessing.get_context("fork").Pool(2) as pool:
        read = pool.map(fetch_all, [(source, places[k::4]) for k in range(4)])
    assert read == [[f"caption {i}" for i in range(k, 200, 4)] for k in range(4)]


def test_more_shards_than_may_be_open_are_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mllm.data.formats.source.OPEN_FILES", 2)
    for i in range(5):
        json_lines(tmp_path / f"{i}.jsonl", [{"image": "a.png", "caption": f"caption {i}"}])
    source = CaptionsSource(path=tmp_path)
    places = [place for k in range(5) for place, _ in source.scan(k)]
    assert [source.fetch(place).messages[1].text for place in places * 2] == [f"caption {i}" for i in range(5)] * 2
    assert len(source.kept()["opened"]) == 2
