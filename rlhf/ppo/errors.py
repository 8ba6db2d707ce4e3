"""What ends a run of stage ppo with its state kept."""

from __future__ import annotations

from finetune.errors import UserError


class RunStopped(UserError):
    """The run cannot go on as it is; its state before is worth keeping."""


class NotFinite(RunStopped):
    """A loss, gradient or probability is NaN or infinite."""


class KLExploded(RunStopped):
    """The policy has left the reference so far behind that rewards and estimates mean nothing any more."""
