"""The errors that edge_spec raises.

EdgeSpecError
├── UsageError (also ValueError)        an argument that cannot be honoured
├── ModelNotFoundError                  no such name, path or hub reference
├── DownloadError                       no source could deliver
├── IntegrityError                      the bytes are not those that the manifest pins
├── ModelFormatError                    a model file is truncated, hostile or inconsistent
├── UnsupportedArchitectureError        the file is well formed, but nothing here runs it
├── StorageError                        the disk is full or cannot be written
├── BackendUnavailableError             an optional library is missing (the message has the install command)
├── BackendError                        the backend library failed
│   └── BackendMemoryError              for want of memory
├── MemoryBudgetError                   what was asked for does not fit the memory that there is
├── VocabMismatchError                  draft and target do not share a vocabulary
├── ContextLengthError                  the prompt does not fit n_ctx
├── RollbackUnsupportedError            the backend cannot shorten its cache that far
├── CacheUnsupportedError               the backend cannot drop tokens from the middle of its cache, or resize it
└── GenerationCancelled                 the caller asked to stop during prefill
"""

from __future__ import annotations


class EdgeSpecError(Exception):
    """Base of every error that edge_spec raises on purpose; its message is fit for the user."""


class UsageError(EdgeSpecError, ValueError):
    """An argument is out of range, unknown, or contradicts another one."""


class ModelNotFoundError(EdgeSpecError):
    """A model, pair, path or hub reference that does not exist."""


class DownloadError(EdgeSpecError):
    """Every source of a model failed; the message lists each with its reason."""


class IntegrityError(EdgeSpecError):
    """A file's size or sha256 is not the one that was pinned."""


class ModelFormatError(EdgeSpecError):
    """A model file is not what it claims to be: truncated, empty, of another format, or inconsistent."""


class UnsupportedArchitectureError(EdgeSpecError):
    """The architecture, tensor type or tokenizer of a valid file is not known here; the message names what is."""


class StorageError(EdgeSpecError):
    """The disk is full, or a folder cannot be written; nothing half-made is left behind."""


class BackendUnavailableError(EdgeSpecError):
    """An optional library is not installed; the message carries the install command."""


class BackendError(EdgeSpecError):
    """A backend library refused or failed a call; raised `from` the library's own error."""


class BackendMemoryError(BackendError):
    """A backend library got no memory from the system."""


class MemoryBudgetError(EdgeSpecError):
    """What would be loaded does not fit. `required_bytes` and `budget_bytes` are of the whole process.

    `largest_n_ctx` is the longest window that fits with everything else as it was asked for; 0 if none does.
    """

    def __init__(self, required_bytes: int, budget_bytes: int, largest_n_ctx: int, message: str) -> None:
        self.required_bytes = required_bytes
        self.budget_bytes = budget_bytes
        self.largest_n_ctx = largest_n_ctx
        super().__init__(message)


class VocabMismatchError(EdgeSpecError):
    """Draft and target disagree on at least one token, so the draft's ids mean nothing to the target."""


class ContextLengthError(EdgeSpecError):
    """A prompt is longer than the window. `needed` and `n_ctx` are in tokens."""

    def __init__(self, needed: int, n_ctx: int) -> None:
        self.needed = needed
        self.n_ctx = n_ctx
        super().__init__(
            f"the prompt has {needed} tokens, and a window of {n_ctx} must hold it and at least one new token; "
            f"raise --ctx (n_ctx=) or shorten the prompt"
        )


class RollbackUnsupportedError(EdgeSpecError):
    """The backend cannot drop the last cached tokens (recurrent state, or a sliding window that has moved on)."""


class CacheUnsupportedError(EdgeSpecError):
    """The model's cache cannot drop tokens from its middle, or change its length; `ModelSpec` says so beforehand."""


class GenerationCancelled(EdgeSpecError):  # noqa: N818 - an outcome, not a fault
    """The caller cancelled while the prompt was being read; what was read stays in the cache."""
