"""The filter removes what was planted and nothing else, says why, and gives the same scores however it is run."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image, ImageOps
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

from conftest import make_clip, make_image_processor, make_processor, make_tokenizer, picture
from mllm.data.curation.filters import near, text
from mllm.data.curation.filters.copies import first_copies, found_in
from mllm.data.curation.filters.look import BYTES, look, stacked
from mllm.data.curation.filters.measure import Blocks
from mllm.data.curation.filters.outside import Scores
from mllm.data.curation.filters.rules import LIMITS, Rules
from mllm.data.formats.captions import CaptionsSource
from mllm.data.index import build_index
from mllm.evaluate.clip_score import ClipScorer

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "data_scripts" / "filter.py"
Lines = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Accelerate remembers for the whole process how it was first asked."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("filter_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["filter_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def lines(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(path: Path, out: Path, rules: Rules | None = None, **options: Any) -> dict[str, str]:
    """The rule that removed each sample that is not kept."""
    script.main(str(path), out, rules or Rules(), workers=0, **options)
    return {line["id"]: line["rule"] for line in lines(out / "removed.jsonl")}


def write(folder: Path, records: Lines, name: str = "data.jsonl") -> Path:
    path = folder / name
    texts = [json.dumps(record) for record in records]
    path.write_text("[" + ",\n ".join(texts) + "]" if path.suffix == ".json" else "\n".join(texts) + "\n")
    return path


def caption(name: str, words: str = "a red circle", **more: Any) -> dict[str, Any]:
    return {"id": name, "image": f"{name}.png", "caption": words, **more}


def pictures(folder: Path, **images: Image.Image) -> Path:
    """A data set of these pictures, in this order."""
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return write(folder, [caption(name) for name in images])


def painting(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """Soft blots, since noise has no look that survives resizing."""
    return picture(seed, (9, 7)).resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


# ------------------------------------------------------------------------------------------- rules of text and size

GOOD = "A red circle stands left of two small squares."
PLANTED = {
    "min_characters": (5, "red"),
    "max_characters": (60, "a circle on a chair under a table in a house on a hill by the sea"),
    "min_words": (3, "red circle"),
    "max_words": (10, "a circle and a square and a cross and a line"),
    "max_repetition": (0.3, "buy it now! Buy it now, buy it now."),
    "max_run": (5, "a red circle ------- and so on"),
    "max_non_letters": (0.4, "IMG 20240112 0034.JPG 1200x800"),
    "max_urls": (0.3, "a shop at https://shop.example.com/items?id=1"),
    "max_capitals": (0.6, "THE BEST RED CIRCLE EVER SEEN"),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    said = {"good": GOOD} | {rule: words for rule, (_, words) in PLANTED.items()}
    return write(folder, [caption(rule, words) for rule, words in said.items()])


@pytest.mark.parametrize("rule", PLANTED)
def test_a_rule_of_text_removes_what_was_planted_for_it_and_keeps_a_good_sentence(planted: Path, rule: str) -> None:
    removed = run(planted, planted.parent / "out", Rules(**{rule: PLANTED[rule][0]}))
    assert removed[f"{rule}#0"] == rule
    assert "good#0" not in removed


def test_all_rules_of_text_together_keep_a_good_sentence(planted: Path) -> None:
    removed = run(planted, planted.parent / "out", Rules(**{rule: limit for rule, (limit, _) in PLANTED.items()}))
    assert [line["id"] for line in lines(planted.parent / "out" / "kept.jsonl")] == ["good#0"]
    assert set(removed) == {f"{rule}#0" for rule in PLANTED}


def test_every_limit_has_an_option_and_a_planted_case_or_a_test_below() -> None:
    told = {rule for rule, _, _ in LIMITS}
    assert told <= set(Rules.__dataclass_fields__)
    assert told == {*PLANTED, "min_side", "max_side", "max_aspect", "min_clip", "min_score"}


@pytest.mark.parametrize(
    ("words", "count"),
    [("don't stop, please", 3), ("一只红色的猫", 6), ("लाल वृत्त", 2), ("- * -", 0), ("猫 cat 2", 3), ("", 0)],
)
def test_words_are_counted_in_any_script(words: str, count: int) -> None:
    assert len(text.words_of(words)) == count


def test_scripts_without_capitals_and_with_vowel_signs_are_letters_and_no_shouting() -> None:
    measured = text.measure_text("लाल वृत्त हिन्दी में")
    assert (measured["capitals"], measured["non_letters"]) == (0, 0)


def test_images_are_judged_by_the_worst_and_text_alone_is_kept(tmp_path: Path) -> None:
    sizes = {"small": (30, 40), "long": (400, 50), "large": (300, 300), "fine": (100, 80)}
    for name, size in sizes.items():
        picture(0, size).save(tmp_path / f"{name}.png")
    turns = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "two"}]
    records = [
        {"id": f"{one}-{other}", "image": [f"{one}.png", f"{other}.png"], "conversations": turns}
        for one, other in [("fine", "fine"), ("fine", "small"), ("long", "fine"), ("fine", "large")]
    ]
    alone = {"id": "alone", "conversations": [{**turns[0], "value": "hello?"}, turns[1]]}
    path = write(tmp_path, [*records, alone], "data.json")
    removed = run(path, tmp_path / "out", Rules(min_side=40, max_aspect=3, max_side=250))
    assert removed == {"fine-small": "min_side", "long-fine": "max_side", "fine-large": "max_side"}
    [also] = [line["also"] for line in lines(tmp_path / "out" / "removed.jsonl") if line["id"] == "long-fine"]
    assert also == ["max_aspect: aspect 8, most 3"]


# ---------------------------------------------------------------------------------------------- copies and leakage


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


# ------------------------------------------------------------------------------------------------ scores from outside


def score_files(folder: Path) -> dict[str, Path]:
    """The same scores in every layout; `c` has none that is a number."""
    table = {"a": 0.9, "b": 0.2, "c": None}
    files = {"object": folder / "object.json", "parquet": folder / "0000.parquet"}
    files["object"].write_text(json.dumps(table))
    files["lines"] = write(folder, [{"id": name, "score": score} for name, score in table.items()], "scores.jsonl")
    files["list"] = write(folder, [{"uid": name, "score": score} for name, score in table.items()], "scores.json")
    words = [{"key": name, "image_text_matching_score": str(score or "n/a")} for name, score in table.items()]
    pq.write_table(pa.Table.from_pylist(words), files["parquet"])  # as MLM-Filter writes them
    return files


@pytest.mark.parametrize("layout", ["object", "lines", "list", "parquet"])
def test_scores_of_another_program_filter_whatever_their_layout(tmp_path: Path, layout: str) -> None:
    (tmp_path / "scores").mkdir()
    path = write(tmp_path, [caption(name) for name in "abcd"])
    file = score_files(tmp_path / "scores")[layout]
    removed = run(path, tmp_path / "out", Rules(min_score=0.5), scores=str(file))
    assert removed == dict.fromkeys(["b#0", "c#0", "d#0"], "min_score")
    reasons = [line["reason"] for line in lines(tmp_path / "out" / "removed.jsonl")]
    assert reasons == ["score 0.2, least 0.5", "no score", "no score"]


def test_scores_find_captions_by_their_record_and_members_of_tars_by_their_key(tmp_path: Path) -> None:
    path = write(tmp_path, [{"key": "000001", "score": 1}, {"key": "b#1", "score": 2}, {"key": "b", "score": 3}])
    scores = Scores(str(path))
    found = [scores(id) for id in ("00000/000001#0", "b#1", "b#0", "x/b", "c")]
    assert found == [1, 2, 3, 3, None]


def test_scores_that_cannot_be_told_are_errors(tmp_path: Path) -> None:
    several = write(tmp_path, [{"id": "a", "clip_score": 1, "other_score": 2}])
    with pytest.raises(ValueError, match=r"row 0: several scores .*--score-key"):
        Scores(str(several))
    assert Scores(str(several), "clip_score")("a") == 1
    with pytest.raises(ValueError, match="has the score 1 already"):
        Scores(str(write(tmp_path, [{"id": "a", "score": 1}, {"id": "a", "score": 2}])))
    with pytest.raises(ValueError, match="no id"):
        Scores(str(write(tmp_path, [{"name": "a", "score": 1}])))


# ------------------------------------------------------------------------------------------------------- CLIP scores


def make_siglip() -> SiglipModel:
    torch.manual_seed(0)
    half = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    return SiglipModel(
        SiglipConfig(
            vision_config={**half, "image_size": 28, "patch_size": 14},
            text_config={**half, "vocab_size": 384, "max_position_embeddings": 16, "projection_size": 24},
        )
    )


@pytest.fixture(scope="module", params=["clip", "siglip"])
def scoring(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the Hub's, of a model that scores images and words."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "clip":
        make_clip().save_pretrained(folder)
        make_image_processor().save_pretrained(folder)
    else:
        make_siglip().save_pretrained(folder)
        SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_scores_are_the_logits_of_transformers_without_scale_and_bias(scoring: Path) -> None:
    scorer = ClipScorer(str(scoring))
    images, texts = [picture(n) for n in range(3)], ["a red circle", "two", "a very long caption " * 9]
    scores = scorer([scorer.see(image) for image in images], texts)
    model, window = scorer.model, scorer.model.config.text_config.max_position_embeddings
    words = make_tokenizer()(texts, padding="max_length", truncation=True, max_length=window, return_tensors="pt")
    pixels = torch.cat([scorer.see(image)["pixel_values"] for image in images])
    with torch.no_grad():
        logits = model(pixel_values=pixels, input_ids=words.input_ids, attention_mask=words.attention_mask)
    bias = getattr(model, "logit_bias", torch.zeros(()))
    scaled = torch.tensor(scores) * model.logit_scale.exp() + bias
    torch.testing.assert_close(scaled, logits.logits_per_image.diagonal(), atol=1e-4, rtol=1e-4)


def test_a_scored_data_set_is_cut_at_the_threshold(scoring: Path, tmp_path: Path) -> None:
    path = pictures(tmp_path, **{f"p{n}": picture(n) for n in range(6)})
    run(path, tmp_path / "out", clip=str(scoring))
    scores = {line["id"]: line["clip"] for line in lines(tmp_path / "out" / "scores.jsonl")}
    bound = sorted(scores.values())[2]
    removed = run(path, tmp_path / "out", Rules(min_clip=bound), clip=str(scoring))
    assert set(removed) == {name for name, score in scores.items() if score < bound}
    assert len(removed) == 2


def test_what_is_no_image_text_model_is_refused(hub: Path, tmp_path: Path) -> None:
    path = pictures(tmp_path, one=picture(1))
    with pytest.raises(ValueError, match="no image-text model at"):
        run(path, tmp_path / "out", clip=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"image-text model|give a model such as CLIP"):
        run(path, tmp_path / "out", clip=str(hub / "llm"))


@pytest.mark.recipe
def test_two_ranks_write_the_lists_of_one(tmp_path: Path) -> None:
    make_clip().save_pretrained(tmp_path / "clip")
    make_image_processor().save_pretrained(tmp_path / "clip")
    make_tokenizer().save_pretrained(tmp_path / "clip")
    path = pictures(tmp_path, **{f"p{n}": picture(n % 190) for n in range(200)})
    clip, rules = str(tmp_path / "clip"), Rules(duplicates=6, min_clip=-1)
    run(path, tmp_path / "one", rules, clip=clip)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command += [str(path), "--out", str(tmp_path / "two"), "--clip", clip, "--duplicates", "6", "--min-clip", "-1"]
    cpus = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # accelerate launch --cpu starts one
    done = subprocess.run([*command, "--workers", "1"], env=cpus, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("kept") == 2  # only rank 0 speaks: the table, and the names of the files
    said = {name: json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")}
    assert said["one"] == said["two"]
    assert said["one"]["by_rule"] == {"duplicates": 10}
    for file in ("kept.jsonl", "removed.jsonl", "scores.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert len(list((tmp_path / "two" / "measured").glob("rank*.jsonl"))) == 2


# ------------------------------------------------------------------------------------------------- ledger and resume


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Six samples: three good ones, two of which bear one id; a broken image; a bad record; a line that is no JSON."""
    path = pictures(tmp_path, a=painting(1), b=painting(2))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    path.write_text(
        path.read_text()
        + "".join(json.dumps(line) + "\n" for line in (caption("a"), caption("broken"), {"id": "x", "image": "a.png"}))
        + "{no json\n"
    )
    return path


def test_what_is_read_is_kept_or_removed_and_faults_are_named(faulty: Path) -> None:
    out = faulty.parent / "out"
    script.main(str(faulty), out, Rules(min_side=1), workers=0, format="captions")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["read"], summary["kept"], summary["by_rule"]) == (6, 3, {"unreadable": 3})
    removed = lines(out / "removed.jsonl")
    assert [line["where"].rpartition(" ")[2] for line in removed] == ["3", "4", "5"]
    assert ["image: cannot read" in removed[0]["reason"], "caption" in removed[1]["reason"]] == [True, True]
    assert len(lines(out / "kept.jsonl")) + len(removed) == summary["read"]


def test_kept_ids_are_those_of_the_index(faulty: Path) -> None:
    script.main(str(faulty), faulty.parent / "out", Rules(min_side=1), workers=0, format="captions")
    index = build_index([CaptionsSource(faulty)], make_processor(), 200, progress=False)
    kept = [line["id"] for line in lines(faulty.parent / "out" / "kept.jsonl")]
    assert kept == index.ids.to_pylist() == ["a#0", "b#0", "a#0~1"]


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pictures(tmp_path, **{f"p{n}": picture(n) for n in range(200)})  # four blocks
    rules = Rules(duplicates=6, min_side=20)
    run(path, tmp_path / "whole", rules)
    measured: list[int] = []
    measure = Blocks.__getitem__

    def counted(blocks: Blocks, number: int) -> Any:
        measured.append(number)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(blocks, number)

    monkeypatch.setattr(Blocks, "__getitem__", counted)
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "out", rules)
    with (tmp_path / "out" / "measured" / "rank0.jsonl").open("a") as file:
        file.write('{"block": 2, "kinds": ["look", "si')  # the power went off
    run(path, tmp_path / "out", rules)
    assert measured == [0, 1, 2, 2, 3]
    for name in ("kept.jsonl", "removed.jsonl", "scores.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_thresholds_measure_nothing_again_and_new_kinds_only_themselves(
    scoring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pictures(tmp_path, **{f"p{n}": picture(n) for n in range(4)})
    run(path, tmp_path / "out", Rules(min_clip=-1), clip=str(scoring))
    scores = [line["clip"] for line in lines(tmp_path / "out" / "scores.jsonl")]
    monkeypatch.setattr(ClipScorer, "cosines", None)
    run(path, tmp_path / "out", Rules(min_clip=-1, duplicates=6, min_side=1), clip=str(scoring))
    monkeypatch.setattr(Blocks, "__getitem__", None)
    removed = run(path, tmp_path / "out", Rules(min_clip=1, min_side=20, duplicates=0), clip=str(scoring))
    assert set(removed.values()) == {"min_clip"}
    found = lines(tmp_path / "out" / "scores.jsonl")
    assert [line["clip"] for line in found] == scores
    assert found[0]["min_side"] == 32


def test_scores_of_another_state_of_the_data_are_not_believed(tmp_path: Path) -> None:
    path = write(tmp_path, [caption("a")])
    run(path, tmp_path / "out")
    write(tmp_path, [caption("a"), caption("b")])
    with pytest.raises(ValueError, match=r"scores of something else \(not the same: files\).*--overwrite"):
        run(path, tmp_path / "out")
    run(path, tmp_path / "out", overwrite=True)
    assert len(lines(tmp_path / "out" / "kept.jsonl")) == 2


def test_overwriting_removes_no_files_of_others(tmp_path: Path) -> None:
    path = write(tmp_path, [caption("a")])
    (tmp_path / "out" / "measured").mkdir(parents=True)
    (tmp_path / "out" / "measured" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="holds other files"):
        run(path, tmp_path / "out", overwrite=True)


def test_a_dry_run_tells_and_writes_no_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, [caption("a"), caption("b", "two")])
    script.main(str(path), tmp_path / "out", Rules(min_words=3), workers=0, dry_run=True, json_output=True)
    assert json.loads(capsys.readouterr().out)["by_rule"] == {"min_words": 1}
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["measured"]


def test_the_table_tells_rule_limit_and_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(write(tmp_path, [caption("a"), caption("b", "two")]), tmp_path / "out", Rules(min_words=3))
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["min_words", "3", "1", "50.0%"] in said
    assert ["kept", "1", "50.0%"] in said


# ---------------------------------------------------------------------------------------------------- kept records


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_kept_records_are_written_as_they_were(tmp_path: Path, name: str) -> None:
    records = [caption("a", "ein roter Kreis, größer als 1.50"), caption("b", "no"), caption("c", price=1e-7)]
    path = write(tmp_path, records, name)
    run(path, tmp_path / "out", Rules(min_words=3), records=True)
    text = (tmp_path / "out" / "records" / name).read_text()
    assert all(json.dumps(record) in text for record in (records[0], records[2]))
    again = CaptionsSource(tmp_path / "out" / "records" / name, image_dir=tmp_path)
    before = [sample for sample in CaptionsSource(path).read() if sample.id != "b#0"]
    kept = [(sample.id, sample.messages, sample.images) for sample in again.read()]
    assert kept == [(sample.id, sample.messages, sample.images) for sample in before]


def test_of_several_captions_only_those_that_stay_are_written(tmp_path: Path) -> None:
    several = {"id": "a", "image": "a.png", "captions": ["a red circle", "no", "two small squares"]}
    path = write(tmp_path, [several, {**several, "id": "b", "captions": ["no"]}])
    run(path, tmp_path / "out", Rules(min_words=3), records=True)
    [written] = lines(tmp_path / "out" / "records" / "data.jsonl")
    assert written == {**several, "captions": ["a red circle", "two small squares"]}


def test_of_several_kinds_of_caption_only_those_that_stay_are_written(tmp_path: Path) -> None:
    record = {"id": "a", "image": "a.png", "alt": "no", "dense": "a red circle"}
    kinds = "{text: {weights: {alt: 1, dense: 1}}}"
    run(write(tmp_path, [record]), tmp_path / "out", Rules(min_words=3), records=True, format="captions", options=kinds)
    [written] = lines(tmp_path / "out" / "records" / "data.jsonl")
    assert written == {"id": "a", "image": "a.png", "dense": "a red circle"}


def test_records_of_a_table_cannot_be_written_and_that_is_said_first(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("id,image,caption\na,a.png,a red circle\n")
    with pytest.raises(ValueError, match="writes JSON lines and JSON lists"):
        run(path, tmp_path / "out", records=True)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--min-clip", "0.3"], "--min-clip needs a model"),
        (["--min-score", "1"], "--scores and --min-score need each other"),
        (["--duplicates", "40"], "give 0 to 16 bits"),
        (["--benchmark", "nowhere"], "nowhere is no folder"),
        (["--workers", "-1"], "--workers is -1"),
    ],
)
def test_mistakes_are_told_in_words(
    tmp_path: Path,
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path, [caption("a")])
    monkeypatch.setattr(sys, "argv", ["filter.py", str(path), "--out", str(tmp_path / "out"), *arguments])
    assert script.door() == 2
    assert told in capsys.readouterr().err
