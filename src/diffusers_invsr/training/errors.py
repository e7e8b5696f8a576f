"""The one kind of error that is a sentence for the person who runs a training script."""

from collections.abc import Iterator
from contextlib import contextmanager


class TrainingError(ValueError):
    """A setting, a file or data that the user can change. The message is a sentence that says which and how."""


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
