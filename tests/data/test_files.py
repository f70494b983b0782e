"""A path means the same files in the same order everywhere; what is far or compressed comes whole or not at all."""

from __future__ import annotations

import functools
import gzip
import json
import os
import pickle
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mllm.data.copies import cache_folder, fetch, unpacked
from mllm.data.files import File, find
from mllm.data.formats.auto import AutoSource
from mllm.data.formats.captions import CaptionsSource
from mllm.data.images import open_image
from writers import img2dataset, json_lines, parquet, png

LINE = '{"image": "a.png", "caption": "a cat"}\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, which stands for one far away."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def put(folder: Path, *names: str, text: str = LINE) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def stems(files: list[File]) -> list[str]:
    return [file.stem for file in files]


# ---------------------------------------------------------------- on this machine


def test_a_folder_means_its_files_of_records_sorted(tmp_path: Path) -> None:
    put(tmp_path / "d", "b.jsonl", "a/z.jsonl", "a/c.jsonl.gz", "README.md", ".cache/x.jsonl", "images/1.png")
    (tmp_path / "d/a/c.jsonl.gz").write_bytes(gzip.compress(LINE.encode()))
    files = find(tmp_path / "d")
    assert stems(files) == ["a/c", "a/z", "b"]
    assert [file.name for file in files] == [str(tmp_path / "d" / n) for n in ("a/c.jsonl.gz", "a/z.jsonl", "b.jsonl")]
    assert [file.path.read_text() for file in files] == [LINE] * 3


def test_a_glob_means_the_files_that_match(tmp_path: Path) -> None:
    put(tmp_path, "x/1.jsonl", "x/2.jsonl", "y/1.jsonl", "y/1.csv")
    assert stems(find(tmp_path / "*/1.jsonl")) == ["x/1", "y/1"]
    assert stems(find(f"file://{tmp_path}/x/*.jsonl")) == ["1", "2"]
    assert stems(find(tmp_path / "**/*.jsonl")) == ["x/1", "x/2", "y/1"]


def test_ids_tell_shards_of_one_name_apart(tmp_path: Path) -> None:
    put(tmp_path, "x/1.jsonl", "y/1.jsonl")
    samples = list(CaptionsSource(path=tmp_path).read())
    assert [(sample.id, sample.images) for sample in samples] == [
        ("x/1/0#0", [tmp_path / "x/a.png"]),
        ("y/1/0#0", [tmp_path / "y/a.png"]),
    ]


@pytest.mark.parametrize("name", ["none.json", "no/*.json", "empty", "http.json/"])
def test_nothing_there_is_told_with_the_flag(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"no data file .*{name.strip('/')[:2]}.*: there is no file, folder or match"):
        find(tmp_path / name)


def test_a_folder_of_several_kinds_must_be_told_which(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", "a.csv")
    with pytest.raises(ValueError, match=r"several kinds \(\.csv, \.jsonl\): say which"):
        find(tmp_path)


def test_a_folder_of_img2dataset_means_its_tars(tmp_path: Path) -> None:
    for number in ("00000", "00001"):
        img2dataset(tmp_path / f"{number}.tar", ["a", "b"])
        parquet(tmp_path / f"{number}.parquet", [{"url": "x", "caption": "a"}])
        put(tmp_path, f"{number}_stats.json", text="{}")
    assert stems(find(tmp_path)) == ["00000", "00001"]
    assert len(list(AutoSource(path=tmp_path).read())) == 4


HUB_NAMES = {
    "data": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
    "bare": ["train.jsonl", "test.jsonl"],
    "folders": ["train/0.jsonl", "train/1.jsonl", "test/0.jsonl"],
}


@pytest.mark.parametrize("layout", HUB_NAMES)
def test_of_several_splits_one_must_be_chosen(tmp_path: Path, layout: str) -> None:
    put(tmp_path, *HUB_NAMES[layout])
    with pytest.raises(ValueError, match="several splits: set `split` to one of test, train"):
        find(tmp_path)
    with pytest.raises(ValueError, match="no split 'val': set `split` to one of test, train"):
        find(tmp_path, split="val")
    train = [name for name in HUB_NAMES[layout] if "train" in name]
    assert [file.name for file in find(tmp_path, split="train")] == [str(tmp_path / name) for name in train]


@pytest.mark.parametrize("asked", [{"split": "val"}, {"subset": "ai2d"}])
def test_a_choice_that_a_file_does_not_offer_is_told(tmp_path: Path, asked: dict[str, str]) -> None:
    put(tmp_path, "a.jsonl")
    with pytest.raises(ValueError, match=r"`subset` 'ai2d' is for data sets of the Hub|no split 'val'"):
        find(tmp_path / "a.jsonl", **asked)


def test_names_that_only_resemble_splits_are_none(tmp_path: Path) -> None:
    put(tmp_path, "training.jsonl", "testament.jsonl", "retrain.jsonl")
    assert len(find(tmp_path)) == 3


# ---------------------------------------------------------------- compressed


@pytest.mark.parametrize("cut", [3, 20, 60])
def test_a_compressed_file_cut_short_is_told_and_leaves_nothing(tmp_path: Path, cut: int) -> None:
    whole = gzip.compress(os.urandom(200))
    (tmp_path / "a.json.gz").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"a\.json\.gz cannot be unpacked"):
        unpacked(tmp_path / "a.json.gz")
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]


def test_a_compressed_file_is_unpacked_once_and_anew_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b"one"))
    first = unpacked(path)
    stamp = first.stat().st_mtime_ns
    assert (unpacked(path), first.stat().st_mtime_ns, first.name) == (first, stamp, "a.json")
    path.write_bytes(gzip.compress(b"two, longer"))
    assert unpacked(path).read_bytes() == b"two, longer"


# ---------------------------------------------------------------- far away


def test_files_far_away_are_read_as_files_here(memory: Any) -> None:
    memory.pipe({"/bucket/d/1.jsonl": LINE.encode(), "/bucket/d/2.jsonl.gz": gzip.compress(LINE.encode())})
    for url in ("memory://bucket/d", "memory://bucket/d/*"):
        samples = list(CaptionsSource(path=url).read())
        assert [sample.id for sample in samples] == ["1/0#0", "2/0#0"]
        assert samples[0].where == "memory:///bucket/d/1.jsonl, row 0"
        assert samples[0].images == ["memory:///bucket/d/a.png"]
    assert stems(find("memory://bucket/d/1.jsonl")) == ["1"]


def test_a_file_far_away_is_fetched_once_and_anew_when_it_changes(memory: Any) -> None:
    memory.pipe({"/b/1.jsonl": LINE.encode()})
    [first], [again] = find("memory://b/1.jsonl"), find("memory://b/1.jsonl")
    assert first == again
    memory.pipe({"/b/1.jsonl": 2 * LINE.encode()})
    [changed] = find("memory://b/1.jsonl")
    assert changed.path.read_text() == 2 * LINE
    assert changed.stem == first.stem


def test_workers_take_over_the_list_of_files_far_away(memory: Any) -> None:
    memory.pipe({"/b/1.jsonl": LINE.encode()})
    source = CaptionsSource(path="memory://b")
    [(place, sample)] = source.scan(0)
    memory.store.clear()
    assert pickle.loads(pickle.dumps(source)).fetch(place) == sample


def test_a_short_download_is_told_and_leaves_nothing(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe({"/b/1.jsonl": LINE.encode()})
    monkeypatch.setattr(type(memory), "get_file", lambda self, name, target: Path(target).write_text("short"))
    with pytest.raises(ValueError, match=r"cannot fetch memory:///b/1\.jsonl: 5 of \d+ bytes came"):
        fetch(memory, "/b/1.jsonl")
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("memory://b/none.jsonl", "no data file memory://b/none"),
        ("memory://b/*.jsonl", "no data file"),
        ("nosuch://b/1.jsonl", "cannot read nosuch://b/1.jsonl: .*nosuch"),
    ],
)
def test_a_url_without_files_is_told(memory: Any, url: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        find(url)


def test_a_file_of_a_web_server_is_fetched(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")  # what fsspec needs for HTTP
    (tmp_path / "1.csv").write_text("image,caption\na.png,a cat\n")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        [sample] = CaptionsSource(path=f"{url}/1.csv?download=true").read()
        with pytest.raises(ValueError, match=r"http://127.*none\.csv"):
            find(f"{url}/none.csv")
        server.shutdown()
    assert (sample.id, sample.images) == ("1/0#0", [f"{url}/a.png"])


def test_splits_and_kinds_are_told_apart_far_away_too(memory: Any) -> None:
    memory.pipe({"/b/train.jsonl": b"", "/b/test.jsonl": b""})
    with pytest.raises(ValueError, match="several splits"):
        find("memory://b")
    assert stems(find("memory://b", split="test")) == ["test"]


def test_an_archive_of_images_far_away_is_fetched(memory: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("x/a.png", png())
    memory.pipe({"/b/images.zip": (tmp_path / "images.zip").read_bytes(), "/b/1.jsonl": LINE.encode()})
    [sample] = CaptionsSource(path="memory://b/1.jsonl", image_dir="memory://b/images.zip").read()
    assert str(sample.images[0]).endswith("images.zip::a.png")
    (tmp_path / "1.jsonl").write_text(LINE.replace("a.png", "x/a.png"))
    [sample] = CaptionsSource(path=tmp_path / "1.jsonl", image_dir=tmp_path / "images.zip").read()
    assert open_image(sample.images[0]).size == (8, 6)


# ---------------------------------------------------------------- data sets of Hugging Face


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    return datasets


def captioned(datasets: Any, rows: int = 5) -> Any:
    """A data set with a column of images, as `datasets` keeps them."""
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    columns = {"image": [{"bytes": png(), "path": None}] * rows, "caption": [f"caption {i}" for i in range(rows)]}
    return datasets.Dataset.from_dict(columns, features=features)


def said(source: AutoSource) -> list[str]:
    samples = list(source.read())
    assert all(open_image(sample.images[0]).size == (8, 6) for sample in samples)
    return [sample.messages[1].text for sample in samples]


def test_a_saved_data_set_is_read_in_its_order(tmp_path: Path, datasets: Any) -> None:
    shuffled = captioned(datasets).shuffle(seed=3)
    shuffled.save_to_disk(tmp_path / "d", num_shards=2)
    source = AutoSource(path=tmp_path / "d")
    assert said(source) == shuffled["caption"][:]
    assert next(sample.id for sample in source.read()) == "data-00000-of-00002/0#0"


def test_of_a_saved_dictionary_a_split_is_chosen(tmp_path: Path, datasets: Any) -> None:
    datasets.DatasetDict(train=captioned(datasets), test=captioned(datasets, 2)).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match="several splits: set `split` to one of train, test"):
        AutoSource(path=tmp_path / "d").shards()
    assert said(AutoSource(path=tmp_path / "d", split="test")) == ["caption 0", "caption 1"]


def test_a_hub_id_gives_the_rows_of_its_split(tmp_path: Path, datasets: Any) -> None:
    (tmp_path / "hub/data").mkdir(parents=True)
    captioned(datasets).to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    captioned(datasets, 2).to_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet")
    path = f"hub:{tmp_path / 'hub'}"  # a folder in the layout of the Hub loads as an id does, without a network
    with pytest.raises(ValueError, match="several splits: set `split` to one of train, test"):
        AutoSource(path=path).shards()
    source = AutoSource(path=path, split="train")
    assert said(source) == said(AutoSource(path=tmp_path / "hub", split="train")) == [f"caption {i}" for i in range(5)]
    assert next(iter(source.read())).where == f"{path}/hub-train.arrow, row 0"


def test_a_subset_of_a_hub_id_is_chosen_by_name(tmp_path: Path, datasets: Any) -> None:
    configs = [{"config_name": name, "data_files": f"{name}/*.jsonl"} for name in ("ai2d", "docvqa")]
    for name in ("ai2d", "docvqa"):
        put(tmp_path / "hub", f"{name}/1.jsonl", text=json.dumps({"image": "https://x.y/1", "caption": name}))
    (tmp_path / "hub/README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    [sample] = AutoSource(path=f"hub:{tmp_path / 'hub'}", subset="docvqa").read()
    assert sample.messages[1].text == "docvqa"
    with pytest.raises(ValueError, match=r"cannot load hub:.*(ai2d|Config name)"):
        AutoSource(path=f"hub:{tmp_path / 'hub'}").shards()


def test_an_id_that_does_not_load_is_told(datasets: Any) -> None:
    with pytest.raises(ValueError, match=r"cannot load hub:no/such-set from the Hub: .+"):
        AutoSource(path="hub:no/such-set").shards()


def test_lines_with_a_folder_of_images_need_no_format(tmp_path: Path) -> None:
    json_lines(tmp_path / "metadata.jsonl", [{"file_name": "0.png", "text": "a cat"}])  # `datasets`' image folder
    (tmp_path / "0.png").write_bytes(png())
    [sample] = AutoSource(path=tmp_path).read()
    assert (open_image(sample.images[0]).size, sample.messages[1].text) == ((8, 6), "a cat")
