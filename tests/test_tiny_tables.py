"""What the tiny recipe's two tables are made from: flags, permuted questions, a place in the page."""

from __future__ import annotations

import json
import sys
from itertools import permutations
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "tiny"))

import connectors
import make_tiny
import three_images
from mllm.config import load_config
from mllm.data.formats.llava import read_llava
from mllm.evaluate.exact import summarise
from mllm.flags import lay_over, split_flags

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", connectors.TRIALS)
def test_flags_of_each_trial_choose_its_connector_for_the_grid_of_the_tiny_encoder(name: str, tmp_path: Path) -> None:
    align, _ = connectors.training_steps(name, tmp_path)
    raw = yaml.safe_load((ROOT / "recipes/tiny/pretrain.yaml").read_text())
    for path, value in split_flags(align.command)[0]:
        lay_over(raw, path, value, yaml.SafeLoader)
    (tmp_path / "laid.yaml").write_text(yaml.safe_dump(raw))
    config = load_config(tmp_path / "laid.yaml").parts().connector
    assert config.type == name
    assert 0 < config.num_tokens(16) <= 16


def test_permuted_questions_are_those_of_the_image_that_now_has_the_number(tmp_path: Path) -> None:
    make_tiny.main(tmp_path, images=90, held_out_images=12, texts=1, images_per_question=3)
    drawn = json.loads((tmp_path / "scenes.json").read_text())
    things = {str(tmp_path / path): scene[0] for path, scene in drawn.items()}
    samples = read_llava(tmp_path / "plain_3.json")
    for sample in samples:
        told = [sample.messages[-1].text]
        for order in permutations(range(3)):
            shown = three_images.permuted(sample, order, things)
            assert shown.messages[:-1] == sample.messages[:-1]
            assert sorted(map(str, shown.images)) == sorted(map(str, sample.images))
            told.append(shown.messages[-1].text)
            stays = order[sample.meta["asked"] - 1] == sample.meta["asked"] - 1
            assert (told[-1] == told[0]) == stays
        assert len(set(told)) == 3


def test_only_answers_that_follow_their_image_count_as_followed() -> None:
    def answers(gold: str, said: str) -> list:
        pairs = zip(gold, said, strict=True)
        return summarise(
            [
                {
                    "id": "",
                    "question": "",
                    "answer": g,
                    "prediction": s,
                    "correct": g == s,
                    "type": "all",
                    "image": None,
                }
                for g, s in pairs
            ]
        )["answers"]

    page = three_images.table([(0, 1, 2), (1, 0, 2)], [answers("abcd", "abcd"), answers("bacd", "bbcc")])
    assert page.splitlines()[2:] == ["| 1, 2, 3 | 100.0 % of 4 |  |", "| 2, 1, 3 | 50.0 % of 4 | 1 of 2 |"]


def test_table_takes_the_place_of_the_earlier_one() -> None:
    page = "before\n<!-- here -->\nold\n<!-- /here -->\nafter\n"
    assert connectors.put_between(page, "new", "here") == page.replace("old", "new")
    with pytest.raises(ValueError, match="put them where"):
        connectors.put_between("before\n<!-- here -->\n", "new", "here")


def test_recipes_page_has_a_place_for_both_tables() -> None:
    page = (ROOT / "recipes/README.md").read_text()
    for mark in (connectors.MARK, three_images.MARK):
        connectors.put_between(page, "", mark)
