"""A recipe, as it is, that notes the samples of each micro-batch on the way: `recorded.py RECORD RECIPE FLAGS`."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from killing import note_samples

if __name__ == "__main__":
    note_samples(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
