"""Errors of the user's world. Each message says where, what was found, what is allowed, what to do."""


class NestedLMError(Exception):
    """Base of every error a user can act on; the command line prints it without a traceback.

    exit_code: what the command line ends with.
    """

    exit_code = 2


class ConfigError(NestedLMError):
    """A preset or override that cannot be run."""


class DataError(NestedLMError):
    """Input text, a tokenizer or a shard that is missing, damaged or not what its manifest says."""


class CheckpointError(NestedLMError):
    """A checkpoint that is incomplete, damaged, or belongs to another model or tokenizer."""


class NumericsError(NestedLMError):
    """A value that is not finite, with the step, the tensor's name and the last good checkpoint."""


class ReportError(NestedLMError):
    """Results that are missing, edited by hand, or may not share a table."""


class InUseError(NestedLMError):
    """A folder or file that another process is writing."""


class CampaignError(NestedLMError):
    """A campaign whose steps failed, that was interrupted, or that another process is running."""


class CampaignInterruptedError(CampaignError):
    """A campaign that a signal stopped; `exit_code` is 128 plus the signal's number."""

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def pip_install(extra: str) -> str:
    """The command that adds one of the project's extras, run in a checkout; the versions are those that were tested."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"
