import pytest

from mllm.evaluate.scorers import exact_match, normalise, wilson_interval


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [("Yes.", "yes"), ("  top   left\n", "top left"), ("ＲＥＤ", "red"), ("Two !", "two"), ("STRASSE", "straße")],
)
def test_case_space_width_and_final_punctuation_do_not_matter(prediction: str, answer: str) -> None:
    assert exact_match(prediction, answer)


@pytest.mark.parametrize(
    ("prediction", "answer"), [("red blue", "red"), ("", "yes"), ("3.5", "35"), ("?", ""), ("a cat", "cat")]
)
def test_other_words_are_wrong(prediction: str, answer: str) -> None:
    assert not exact_match(prediction, answer)


def test_normalising_twice_is_normalising_once() -> None:
    for text in ("Yes . ", "…", "ﬁne!?", "a  b"):
        assert normalise(normalise(text)) == normalise(text)


def test_wilson_interval_equals_the_value_by_hand() -> None:
    # p = 0.8, n = 10, z = 1.96: centre (0.8 + 0.19208) / 1.38415, half 1.96 / 1.38415 * sqrt(0.016 + 0.0096036)
    assert wilson_interval(8, 10) == pytest.approx((0.49016, 0.94333), abs=1e-4)


def test_wilson_interval_of_all_right_is_not_a_point() -> None:
    low, high = wilson_interval(10, 10)
    assert low == pytest.approx(1 / (1 + 1.95996**2 / 10), abs=1e-5)
    assert high == pytest.approx(1.0)


@pytest.mark.parametrize(("correct", "number"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_what_is_no_share(correct: int, number: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(correct, number)
