"""The one error that the engine raises on purpose.

NarrowError            a sentence for the user: what was wrong, where, what to do; `code` is stable, for programs
└── Cancelled          the run was asked to stop; what it had finished is kept and a later run goes on from there
"""


class NarrowError(Exception):
    """Something that the user can understand and mend. `str(error)` is the sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Cancelled(NarrowError):
    """The run stopped because it was asked to."""

    def __init__(self) -> None:
        super().__init__("cancelled", "The run was cancelled. What it had finished is kept.")


def out_of_memory(error: Exception) -> bool:
    """Whether that is why it was raised. torch says it in words only, and of what CUDA's libraries say, the name of a status."""
    told = str(error)
    words = ("out of memory", "can't allocate memory", "Cannot allocate memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in told for word in words)
