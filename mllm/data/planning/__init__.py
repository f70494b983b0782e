"""Behind `plan.py`: the order of a source, the mixture of several, the rows of a window, the best row length."""
