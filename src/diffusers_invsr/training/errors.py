"""The one kind of error that is a sentence for the person who runs a training script."""

from collections.abc import Iterator
from contextlib import contextmanager


class TrainingError(ValueError):
    """
    Something that the user can correct: a setting, a file or the data. The message is a sentence that says what.

    Args:
        message (`str`):
            The sentence. A `DataLoader` raises the errors of its workers again with their traceback as message, of
            which the sentence is the end.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition("TrainingError: ")[2].strip())


@contextmanager
def training_errors() -> Iterator[None]:
    """
    Turn a `ValueError` or an `OSError` of the block into a [`TrainingError`] with the same message.

    For the part of a script that reads what its settings name (files, folders, Hub ids, configurations): there the
    package and diffusers raise these for a wrong setting. After it, they are bugs and keep their traceback.
    """
    try:
        yield
    except TrainingError:
        raise
    except (OSError, ValueError) as error:
        raise TrainingError(str(error)) from error
