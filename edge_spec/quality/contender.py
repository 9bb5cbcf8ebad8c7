"""A model under comparison: what it is called, how it is loaded, and how its logits are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from edge_spec.backends.base import CausalLM
from edge_spec.chat_template import ChatTemplate
from edge_spec.decoding.drafter import Drafter
from edge_spec.decoding.session import Session
from edge_spec.drafting import ModelDrafter
from edge_spec.errors import UsageError
from edge_spec.loading import (
    BACKENDS,
    Loader,
    Source,
    check_kv_type,
    chosen_recipe,
    draft_recipe,
    engine_key,
    find_source,
)
from edge_spec.store import Store
from edge_spec.tokenizer import Tokenizer, check_same_vocabulary
from edge_spec.types import Logits

N_CTX = 2048
"""Tokens that a contender reads at most in one go: the longest prompt of a workload and its answer."""


@dataclass(frozen=True, slots=True)
class Name:
    """`BACKEND:MODEL`, or `BACKEND:MODEL@RECIPE`: a model (or a file, or an export's folder) on a backend.

    `BACKEND/KV:MODEL` has keys and values stored as `KV`.
    """

    backend: str
    model: str
    recipe: str | None = None
    kv: str | None = None

    @classmethod
    def parse(cls, text: str) -> Name:
        """Read one; UsageError says what it looks like."""
        where, colon, rest = text.partition(":")
        backend, slash, kv = where.partition("/")
        model, at, recipe = rest.rpartition("@") if "@" in rest else (rest, "", "")
        if not colon or not model or backend not in BACKENDS or (at and not recipe) or (slash and not kv):
            raise UsageError(
                f"{text!r} is no contender: write BACKEND:MODEL, BACKEND:MODEL@RECIPE or BACKEND/KV:MODEL, with a "
                f"backend of {', '.join(BACKENDS)}"
            )
        check_kv_type(kv or None, backend)
        return cls(backend, model, recipe or None, kv or None)

    def __str__(self) -> str:
        """As it is written."""
        where = f"{self.backend}/{self.kv}" if self.kv else self.backend
        return f"{where}:{self.model}" + (f"@{self.recipe}" if self.recipe else "")


@dataclass(frozen=True, slots=True)
class Contender:
    """A loaded model with its tokenizer. `identity` changes whenever its logits may: a key for what it said."""

    name: str
    identity: str
    backend: str
    recipe: str
    weight_bytes: int
    tokenizer: Tokenizer
    template: ChatTemplate
    model: CausalLM
    session: Session
    drafter: Drafter | None = None

    def rows(self, tokens: Sequence[int], start: int = 0) -> Iterator[tuple[int, Logits]]:
        """Logits behind tokens `start`, `start` + 1, ... of `tokens`, some rows at a time: (first position, rows).

        A row is valid until the next one is asked for.
        """
        self.session.forget()
        self.model.rollback(0)
        for at in range(0, start, N_CTX // 8):
            self.model.decode(list(tokens[at : min(at + N_CTX // 8, start)]), rows=0)
        step = self.model.spec.max_rows
        for at in range(start, len(tokens), step):
            part = list(tokens[at : at + step])
            yield at, self.model.decode(part, rows=len(part)).logits


@contextmanager
def load(name: Name, store: Store, *, threads: int, draft: str | None = None) -> Iterator[Contender]:
    """Load a contender, exported first where it has to be; closed at the end of the block.

    `draft`: a model that drafts for it, which makes its answers come sooner and leaves them the same.
    """
    source = find_source(store, name.model)
    loader = Loader(store=store, backend=name.backend, threads=threads, kv=name.kv)
    n_ctx = min(N_CTX, source.n_ctx_train)
    loaded = loader.load(source, n_ctx=n_ctx, recipe=chosen_recipe(name.recipe, name.backend, source), aligned=True)
    session, drafter = Session(loaded.model), None
    try:
        if draft is not None:
            drafter = _load_draft(draft, loader, store, source, n_ctx)
        yield Contender(
            name=str(name),
            identity=f"{source.sha256} {loaded.stored} | {engine_key(loaded.backend)}",
            backend=loaded.backend,
            recipe=loaded.recipe,
            weight_bytes=loaded.model.spec.weight_bytes,
            tokenizer=source.tokenizer,
            template=source.template,
            model=loaded.model,
            session=session,
            drafter=drafter,
        )
    finally:
        session.close()
        if drafter is not None:
            drafter.close()


def _load_draft(draft: str, loader: Loader, store: Store, target: Source, n_ctx: int) -> Drafter:
    source = find_source(store, draft, share=target.tokenizer)
    check_same_vocabulary(target.tokenizer, source.tokenizer)
    loaded = replace(loader, kv=None).load(source, n_ctx=n_ctx, recipe=draft_recipe(source), aligned=False)
    return ModelDrafter(Session(loaded.model))
