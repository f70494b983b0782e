import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mllm.evaluate.exact import Answer, summarise
from mllm.evaluate.report import write_report
from mllm.evaluate.report.story import Curve, choose_gallery, read_curve

HOSTILE = '<script src="http://evil"></script> $x$ & "<img onerror=1>'


def answers(folder: Path, number: int = 12, prediction: str = "no") -> list[Answer]:
    """Two questions a picture, every third one wrong."""
    made: list[Answer] = []
    for at in range(number):
        image = folder / f"{at // 2}.png"
        Image.new("RGB", (64, 64), (20 * at, 80, 120)).save(image)
        right = at % 3 != 0
        made.append(
            Answer(
                id=f"{at}#1",
                question=f"is it {at}?",
                answer="yes",
                prediction="yes" if right else prediction,
                correct=right,
                type=("colour", "count")[at % 2],
                image=str(image),
            )
        )
    return made


def metrics(folder: Path, name: str) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 3 / step}) + "\n" for step in range(1, 30)))
    return path


@pytest.fixture
def report(tmp_path: Path) -> tuple[str, Path]:
    results = {
        "plain": summarise(answers(tmp_path, prediction=HOSTILE)),
        "blank": summarise(answers(tmp_path)[:3]),
    }
    curves = {stage: metrics(tmp_path, stage) for stage in ("align", "instruct")}
    page, figure = write_report(tmp_path / "out", HOSTILE, results, curves, {"align": 12.5})
    return page.read_text(encoding="utf-8"), figure


def test_the_report_is_self_contained(report: tuple[str, Path]) -> None:
    page, _ = report
    markup = page.replace("http://evil", "")  # said by the model, and only said
    assert not re.search(r"https?://|@import|url\(|<script|<link", markup)
    sources = re.findall(r'\ssrc="([^"]*)', page)
    assert len(sources) == 12
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_a_hostile_answer_is_shown_and_not_obeyed(report: tuple[str, Path]) -> None:
    page, _ = report
    assert "&lt;script src=&quot;http://evil&quot;&gt;" in page
    assert "<script" not in page
    assert "<img onerror" not in page


def test_the_figure_is_a_picture_of_some_size(report: tuple[str, Path]) -> None:
    with Image.open(report[1]) as figure:
        assert figure.format == "PNG"
        assert min(figure.size) > 1000


def test_right_and_wrong_answers_are_both_shown(tmp_path: Path) -> None:
    shown = choose_gallery(answers(tmp_path), 6)
    assert [answer["correct"] for answer in shown] == [True] * 4 + [False] * 2
    assert len({answer["image"] for answer in shown}) == 6
    assert {answer["type"] for answer in shown} == {"colour", "count"}


def test_a_perfect_model_fills_the_gallery_with_right_answers(tmp_path: Path) -> None:
    right = [answer for answer in answers(tmp_path) if answer["correct"]]
    assert len(choose_gallery(right, 6)) == 6


def test_a_picture_that_is_not_on_disk_is_not_shown(tmp_path: Path) -> None:
    gone = [Answer(**{**answer, "image": "nowhere.png"}) for answer in answers(tmp_path)]
    assert choose_gallery(gone, 6) == []


def test_a_report_without_pictures_or_curves_is_still_a_report(tmp_path: Path) -> None:
    result = summarise([Answer(**{**answer, "image": None}) for answer in answers(tmp_path)])
    page, figure = write_report(tmp_path, "words alone", {"plain": result}, {}, {})
    assert "66.7%" in page.read_text(encoding="utf-8")
    assert figure.exists()


def test_the_running_mean_of_a_straight_line_is_that_line_but_for_its_ends() -> None:
    curve = Curve("align", list(range(200)), [float(step) for step in range(200)])
    assert curve.smooth[10:-10] == pytest.approx(curve.loss[10:-10])


def test_a_line_of_metrics_without_a_loss_is_no_point(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"event": "saved"}\n{"step": 2, "loss": 2}\n')
    assert read_curve("align", path) == Curve("align", [1, 2], [2.5, 2.0])
