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


NO_MEMORY = ("MemoryError", "bad_alloc", "out of memory", "allocate memory", "map segment", "STATUS_ALLOC_FAILED")
"""How Python, C++, the system, its loader, torch and CUDA's libraries say that there was none."""


def out_of_memory(error: Exception) -> bool:
    """Whether that is why it was raised, which torch says in words only."""
    return isinstance(error, MemoryError) or tells_of_no_memory(str(error))


def tells_of_no_memory(message: str) -> bool:
    # The loader maps no segment from a disk that nothing may be run from either.
    return any(word in message for word in NO_MEMORY) and "Operation not permitted" not in message
