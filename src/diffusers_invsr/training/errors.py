"""The one kind of error that is a sentence for the person who runs a training script."""

from collections.abc import Iterator
from contextlib import contextmanager


class TrainingError(ValueError):
    """
    Something that the user can correct: a setting, a file or the data. The message is a sentence that says what.

    Args:
        message (`str`):
            The sentence. A `DataLoader` makes the errors of its workers again, from a message that is their traceback:
            then it is the end of that.
    """

    def __init__(self, message: str):
        if message.startswith("Caught TrainingError in DataLoader worker"):
            message = message.rpartition("TrainingError: ")[2].strip()
        super().__init__(message)


@contextmanager
def training_errors() -> Iterator[None]:
    """
    Turn a `ValueError` or an `OSError` of the block into a [`TrainingError`] with the same message.

    For the calls that read what a script's settings name (files, folders, Hub ids, configurations): there the package
    and diffusers raise these for a wrong setting. Elsewhere they are bugs and keep their traceback.
    """
    try:
        yield
    except TrainingError:
        raise
    except (OSError, ValueError) as error:
        raise TrainingError(str(error)) from error
