"""Scores, another program's or CLIP's own, are those of their samples, however the filter is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

from conftest import make_clip, make_image_processor, make_tokenizer, picture
from filtering import SCRIPT, caption, lines, pictures, run, write
from mllm.data.curation.filters.measure import Blocks
from mllm.data.curation.filters.outside import Scores
from mllm.data.curation.filters.rules import Rules
from mllm.evaluate.clip_score import ClipScorer

pytestmark = pytest.mark.usefixtures("alone")


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
