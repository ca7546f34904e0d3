"""Errors that a user can mend.

Each carries one sentence that names the thing that is wrong and the remedy. The command line prints the
sentence and exits with status 2; whoever calls mmcore from Python gets an ordinary exception.
"""

from __future__ import annotations

import errno

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What a disk that is full answers, or a limit on the size of a file."""


class MMError(Exception):
    """The base of every error whose message is meant for the user."""


class ConfigError(MMError):
    """A recipe or an option is wrong: an unknown key, a wrong type, values that contradict one another."""


class DataError(MMError):
    """A text, token or tokenizer file cannot be used."""


class CheckpointError(MMError):
    """A checkpoint is missing, cut short, altered, or does not fit the model it is loaded into."""


class HardwareError(MMError):
    """The machine lacks what was asked for: a device, memory, disk, a compiler."""


class NonFiniteError(MMError):
    """A loss or gradient is NaN or infinite; nothing was updated."""


class SpikeError(MMError):
    """The loss went up again and again, more often than the recipe lets a run go back; nothing was updated."""
