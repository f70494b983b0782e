"""Libraries speak when spoken to.

Enters: nothing. Leaves: loading bars, advice and warnings of renamed methods off; errors stay. Called by the
commands and the recipes, never by an import.
"""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Switch off what libraries print about themselves."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # what DeepSpeed calls
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it misses a kernel that it can do without
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
