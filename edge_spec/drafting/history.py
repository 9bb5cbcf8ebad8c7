"""Copying from what was answered before: the same user often asks for the same things."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_spec.answer_file import AnswerFile
from edge_spec.decoding.drafter import Request
from edge_spec.drafting.corpus import Corpus
from edge_spec.drafting.reference import CopyDrafter
from edge_spec.errors import StorageError

MIN_MATCH = 3
"""Of so much text, two tokens say little."""
_MIN_ANSWER = 8
"""Shorter answers are not worth their place."""


class PastAnswers:
    """The answers in a file and those of this process, as indexes that several drafters may share.

    The file is read and indexed at the first use, and not again: what other processes write meanwhile is for the next
    start. A file that cannot be used costs no answer: `take_problems` says what was wrong.
    """

    def __init__(self, file: AnswerFile) -> None:
        self._file = file
        self._old: Corpus | None = None
        self._new_answers: list[tuple[int, ...]] = []
        self._new: Corpus | None = None
        self._problems: list[str] = []

    def corpora(self) -> list[Corpus]:
        """The indexes, older answers first."""
        if self._old is None:
            try:
                answers: list[NDArray[np.int32]] = self._file.read()
            except StorageError as exc:
                answers = []
                self._problems.append(str(exc))
            self._old = Corpus(answers, order=MIN_MATCH)
        if self._new is None:
            self._new = Corpus(self._new_answers, order=MIN_MATCH)
        return [self._old, self._new]

    def add(self, ids: Sequence[int]) -> None:
        """Learn an answer, here and in the file."""
        answer = tuple(ids)
        if len(answer) < _MIN_ANSWER or answer in self._new_answers:
            return
        self._new_answers.append(answer)
        self._new = None
        try:
            self._file.append(answer)
        except StorageError as exc:
            self._problems.append(f"this answer was not kept for later drafts: {exc}")

    def take_problems(self) -> list[str]:
        """What went wrong since the last call."""
        problems, self._problems = self._problems, []
        return problems


class HistoryDrafter(CopyDrafter):
    """Copies from past answers.

    Not where a seed has to give the same text at a temperature: what is drafted decides how many random numbers are
    drawn, and past answers differ from run to run.
    """

    name = "history"

    def __init__(self, past: PastAnswers, *, max_draft: int = 10, bold: bool = False) -> None:
        super().__init__(min_match=MIN_MATCH, max_draft=max_draft, bold=bold)
        self._past = past

    def start(self, request: Request) -> None:
        """Index what is new."""
        super().start(request)
        self.corpora = []
        if request.sampling.temperature == 0 or request.sampling.seed is None:
            self.corpora = self._past.corpora()
