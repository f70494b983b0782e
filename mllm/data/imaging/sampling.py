"""Which frames of a video are looked at: the one policy of training, chat and evaluation, a pure function."""


def uniform(total: int, wanted: int) -> list[int]:
    """Of `total` frames the middles of `wanted` equal segments, rising, none twice; of fewer frames each once.

    `uniform(100, 4)` is `[12, 37, 62, 87]`, `uniform(3, 8)` is `[0, 1, 2]`.
    """
    number = min(total, wanted)
    return [(2 * place + 1) * total // (2 * number) for place in range(number)]
