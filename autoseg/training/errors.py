"""Why training ends before its end."""

from __future__ import annotations

from autoseg.errors import AutosegError


class Diverged(AutosegError):
    """The loss is no number any more, or nothing was learned: the job does not count as trained."""


class Pruned(Exception):
    """A sweep stops the trial: others did better by this epoch."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C: the job was saved and will go on from there."""
