"""Libraries that leave the terminal to us."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Leave the terminal to our own messages."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"torch|peft|trl|transformers|bitsandbytes")
    for name in ("bitsandbytes", "trl", "peft", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
