"""Every error streamconv raises on purpose, and the exit code a script sees.

    StreamconvError                exit
    ├── OptionError                  2   an option's value is unknown, or two options contradict each other
    ├── InputError                   3   what was given cannot be used: change it
    │   ├── CheckpointError              an index, header or shard is missing or broken
    │   ├── AdapterError                 the adapter does not fit this base model
    │   └── UnsupportedError             recognised, but not handled; the message says what is
    ├── OutputError                  4   the place to write to: exists, in use, not writable, another run's
    ├── ResourceError                5   disk, memory, GPU: free some and run again, it resumes
    ├── HubError                     6   not found, gated, unauthorized, offline, network
    ├── StoreError                   6   the same of an object store
    └── VerificationError            7   the output is not what the plan says, or lost the fine-tune

Misspelt options (exit 2, too) belong to click. A message names the file or tensor, what was found, what was
expected, and what to do.
"""


class StreamconvError(Exception):
    """Base of all deliberate errors; `exit_code` is what the command line ends with.

    Names and values in a message come from files that anyone may have written, so of one that is long the middle is
    left out: it begins with the place, and ends with the remedy.
    """

    exit_code = 1
    longest = 1400

    def __init__(self, message: str) -> None:
        end = self.longest // 3
        if len(message) > self.longest:
            message = f"{message[: self.longest - end]} [...] {message[-end:]}"
        super().__init__(message)


class OptionError(StreamconvError):
    """An option's value is unknown, or two options contradict each other."""

    exit_code = 2


class InputError(StreamconvError):
    """An input cannot be used."""

    exit_code = 3


class CheckpointError(InputError):
    """An index, header or shard is missing or broken."""


class AdapterError(InputError):
    """The adapter does not fit this base model, or not all of it would be used."""


class UnsupportedError(InputError):
    """Recognised, but not handled."""


class OutputError(StreamconvError):
    """The output folder cannot be used."""

    exit_code = 4


class ResourceError(StreamconvError):
    """Not enough disk, memory or GPU memory."""

    exit_code = 5


class HubError(StreamconvError):
    """The Hub or the network said no."""

    exit_code = 6


class StoreError(StreamconvError):
    """An object store or the network said no."""

    exit_code = 6


class VerificationError(StreamconvError):
    """The output is not what the plan says, or it does not keep the fine-tune."""

    exit_code = 7


class Stopped(StreamconvError):  # noqa: N818  a signal asked for it; nothing is wrong
    """Stopped by a signal with all state saved; the same command continues."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
