"""Parameter-efficient fine-tuning of Baichuan 2 on today's transformers, without remote code.

Importing this package registers the Baichuan classes with transformers' Auto classes, so that
``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load official folders with
``trust_remote_code=False``. The command line is the exception: it registers when a command needs a model, so
that ``--help`` need not wait for torch.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path

__version__ = "0.1.0"

# PyTorch's idle CPU threads spin, which slows every process several-fold as soon as another wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _is_command_line() -> bool:
    if Path(sys.argv[0] if sys.argv else "").name in ("finetune", "finetune.exe"):
        return True
    module = next((after for flag, after in pairwise(sys.orig_argv) if flag == "-m"), "")
    return module in ("finetune", "finetune.__main__", "finetune.cli")


if not _is_command_line():
    from finetune.baichuan.register import register

    register()
