"""The exceptions that a person sees. A message names the setting, its value, the rule and the remedy, in one line."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


class LMSaesError(Exception):
    """Anything that the user of the package can put right."""


class ConfigError(LMSaesError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(LMSaesError, ValueError):
    """A batch, a text source or a cached shard that is not what it should be."""


class CheckpointError(LMSaesError, RuntimeError):
    """A checkpoint that is absent, torn, altered, or made by another run."""


class TrainingError(LMSaesError, RuntimeError):
    """A run that cannot go on, such as one whose loss is no longer finite."""


class OtherProcessError(LMSaesError, RuntimeError):
    """Another process of the run has failed, and tells why."""


class LostProcessError(OtherProcessError):
    """Another process of the run has ended, or does not answer; if it could still tell why, it has."""


class Interrupted(LMSaesError):
    """A run that was asked to stop by a signal, and has saved."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal
