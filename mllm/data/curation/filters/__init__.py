"""Filters: which samples of a source are worth learning from, by rules that anybody can check.

Enters: a source and `Rules`. Leaves: of every sample its scores, and for every sample that is left out the reasons.
Measuring (`measure`, slow, kept in a `store`) stands apart from judging (`verdict`, pure, done in a moment): other
thresholds cost nothing. One file each for what is measured: `text`, `size`, `look` of a picture.
"""
