"""What the reference says: the texts that are scored, its own answers, and its distributions, kept between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from edge_spec.benchmark.workload import Prompt
from edge_spec.decoding.decoder import SpeculativeDecoder
from edge_spec.errors import StorageError
from edge_spec.quality.contender import N_CTX, Contender
from edge_spec.quality.distributions import KEPT, Expected, Passage, expect
from edge_spec.tokenizer import Tokenizer

WINDOW_TOKENS = 1024
"""The fixed text is cut into pieces of so many tokens, each read from an empty cache."""

_FORMAT = 1
"""Raised whenever what is kept would differ."""

Note = Callable[[str, int, int], object]
"""Called as `note(stage, done, total)`."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The passages to compare at, and what the reference expects there."""

    text: tuple[Passage, ...]
    answers: tuple[Passage, ...]
    on_text: Expected
    on_answers: Expected


def fixed_text() -> str:
    """The text that comes with the package: pages and sources of this project as they once were."""
    return resources.files("edge_spec.quality").joinpath("text.txt").read_text("utf-8")


def cut_text(tokenizer: Tokenizer, text: str, window: int = WINDOW_TOKENS) -> list[Passage]:
    """`text` in pieces of `window` tokens (the last may be shorter), each token but the first predicted."""
    ids = tokenizer.encode(text)
    lead = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    step = window - len(lead)
    pieces = [lead + ids[at : at + step] for at in range(0, len(ids), step)]
    return [Passage(tuple(piece), 1) for piece in pieces if len(piece) > 1]


def consult(
    contender: Contender,
    prompts: Sequence[Prompt],
    *,
    answer_tokens: int,
    text: str,
    cache_dir: Path,
    note: Note | None = None,
) -> Reference:
    """Let the reference answer `prompts`, greedily, and score its own answers and `text`.

    Everything is kept in `cache_dir` under a name made of all that it depends on. Raises StorageError if it cannot be
    written. Prompts that leave no room for an answer in the window are left out.
    """
    said = [_FORMAT, N_CTX, contender.identity, answer_tokens, [asdict(prompt) for prompt in prompts]]
    answers = _answers(contender, prompts, answer_tokens, cache_dir / f"answers-{_digest(said)}.jsonl", note)
    pieces = cut_text(contender.tokenizer, text, min(WINDOW_TOKENS, contender.model.spec.n_ctx))
    scored = []
    for name, passages in (("text", pieces), ("answers", answers)):
        if note is not None:
            note(f"the reference on its {name}", 0, 1)
        ids = [(passage.ids, passage.start) for passage in passages]
        path = cache_dir / f"expected-{_digest([_FORMAT, KEPT, contender.identity, ids])}.npz"
        expected = _read(path)
        if expected is None:
            expected = expect(contender, passages)
            _write(path, expected)
        scored.append(expected)
    return Reference(tuple(pieces), tuple(answers), *scored)


def _answers(
    contender: Contender, prompts: Sequence[Prompt], max_tokens: int, kept: Path, note: Note | None
) -> list[Passage]:
    """First turns and their answers, with the token that ends each. Those in the file `kept` are not made again."""
    answers: dict[str, list[int]] = {}
    if kept.exists():
        answers = dict(json.loads(line) for line in kept.read_text("utf-8").splitlines() if line.endswith("]"))
    passages = []
    for number, prompt in enumerate(prompts):
        if note is not None:
            note("answers of the reference", number, len(prompts))
        ids = contender.template.render_ids([{"role": "user", "content": prompt.turns[0]}], contender.tokenizer)
        if len(ids) + max_tokens > contender.model.spec.n_ctx:
            continue
        if prompt.id not in answers:
            decoder = SpeculativeDecoder(contender.session, contender.drafter)
            steps = decoder.generate(ids, max_tokens=max_tokens, stop_ids=contender.tokenizer.stop_ids)
            answers[prompt.id] = [token for step in steps for token in step.tokens]
            append_line(kept, [prompt.id, answers[prompt.id]])
        passages.append(Passage((*ids, *answers[prompt.id]), len(ids)))
    return passages


def append_line(path: Path, value: object) -> None:
    """Add a JSON value, on a line of its own, to a file that is made if need be; StorageError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
    except OSError as exc:
        raise StorageError(f"{path} cannot be written: {exc}; make room") from exc


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _read(path: Path) -> Expected | None:
    """What was kept, None if nothing (readable) was."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return Expected(*(kept[name] for name in Expected.__slots__))
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _write(path: Path, expected: Expected) -> None:
    arrays = {name: getattr(expected, name) for name in Expected.__slots__}
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        partial.replace(path)
    except OSError as exc:
        partial.unlink(missing_ok=True)
        raise StorageError(f"what the reference said cannot be kept in {path.parent}: {exc}; make room") from exc
