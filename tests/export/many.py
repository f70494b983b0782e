"""Run in a fresh process: `mllm/export/reload.py` on many exported folders, one after the other.

    python -I many.py RELOAD.py LIST.json [PACKAGES]

Enters: pairs of an exported folder and its reference folder; if wanted, packages that come first on the path. Leaves:
one line of JSON for each pair, on stdout. The imports, most of what a proof costs, are paid once.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path


def main() -> None:
    script, pairs, *packages = sys.argv[1:]
    sys.path[:0] = packages
    own = importlib.util.spec_from_file_location("reload", script)
    assert own is not None
    assert own.loader is not None
    reload = importlib.util.module_from_spec(own)
    own.loader.exec_module(reload)
    sys.meta_path.insert(0, reload.Absent())
    for folder, reference in json.loads(Path(pairs).read_text()):
        try:
            found = reload.compare(folder, reference)
        except Exception as error:
            found = {**reload.versions(), "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
