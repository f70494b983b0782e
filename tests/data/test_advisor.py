"""The advisor: lengths of row that fit the data are found, those that do not are named."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from mllm.data.planning.advisor import MULTIPLE, advise, best, fills, warning


def captions(image_tokens: int, number: int = 50_000, text: float = 27.4) -> np.ndarray:
    """Images of constant tokens with short captions."""
    words = np.random.default_rng(0).lognormal(np.log(text) - 0.06, 0.35, number)
    return image_tokens + np.clip(np.rint(words), 6, 120).astype(np.int32)


def test_576_token_images_leave_a_ninth_of_4096_empty_and_nothing_of_4224() -> None:
    short, long = fills(captions(576), [4096, 4224])
    assert short.fill == pytest.approx(0.884, abs=0.002)
    assert long.fill > 0.999
    assert best(advise(captions(576), up_to=6000)).seq_length == 4224


def test_a_length_that_wastes_is_named_with_a_better_neighbour() -> None:
    text = warning(captions(576), 4096)
    assert text is not None
    assert re.fullmatch(r"data\.seq_length 4096 leaves 11\..% of every row empty .*: 4224 would leave 0\..%", text)


@pytest.mark.parametrize("seq_length", [4224, 128, 700])
def test_a_length_that_fits_or_has_no_neighbours_is_not_warned_of(seq_length: int) -> None:
    assert warning(captions(576)[:100] if seq_length > 700 else np.full(9, 100), seq_length) is None


def test_varied_lengths_fill_every_row() -> None:
    lengths = np.random.default_rng(0).integers(20, 1500, 3000)
    assert all(advice.fill > 0.995 for advice in advise(lengths, up_to=4096, start=2304))
    assert warning(lengths, 4096) is None


def test_the_table_holds_the_multiples_of_128_that_hold_the_longest() -> None:
    assert [advice.seq_length for advice in advise([300, 500], up_to=1000)] == [512, 640, 768, 896]
    assert advise([2000], up_to=1000) == []
    assert all(advice.seq_length % MULTIPLE == 0 for advice in advise(captions(144), up_to=1024))


def test_few_samples_are_judged_as_if_there_were_many() -> None:
    assert fills([604], [604 * 7])[0].fill == 1
    assert fills([604], [4096])[0].fill == pytest.approx(6 * 604 / 4096)


def test_the_shortest_of_equal_lengths_is_best() -> None:
    assert best(advise([128], up_to=512)).seq_length == 128


def test_advice_on_a_million_lengths_takes_a_moment() -> None:
    lengths = np.tile(captions(576), 20)
    start = time.process_time()
    warning(lengths, 8192)
    assert time.process_time() - start < 2
