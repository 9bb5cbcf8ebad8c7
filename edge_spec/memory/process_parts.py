"""The parts that belong to no model: interpreter, tokenizer, indexes and the backends' libraries, all of them measured;
and what is set aside for parked chats."""

from __future__ import annotations

from collections.abc import Sequence

from edge_spec.cores import usable_processors
from edge_spec.memory import runtime
from edge_spec.memory.facts import ModelFacts
from edge_spec.memory.parts import Component, Owner, Settings, Source


def process_parts(target: ModelFacts, backends: Sequence[str], settings: Settings) -> list[Component]:
    """What the process holds for a target's vocabulary on these backends. A draft shares the target's tokenizer."""

    def part(name: str, committed: int = 0, **fields: int | bool) -> Component:
        return Component(
            owner=Owner.PROCESS,
            name=name,
            committed_bytes=committed,
            source=Source.MEASURED,
            **fields,  # type: ignore[arg-type]
        )

    libraries = sorted(set(backends))
    code = max(runtime.SHARED_LIBRARIES[name] for name in libraries)
    tokenizer = runtime.TOKENIZER + runtime.TEMPLATE
    tokenizer += runtime.TOKENIZER_PER_TOKEN * target.n_vocab + runtime.TOKENIZER_PER_MERGE * target.merges
    parts = [
        part(
            "python",
            runtime.PYTHON,
            mapped_bytes=code,
            touched_bytes=code,
            reserved_bytes=max(runtime.RESERVED[name] for name in libraries)
            + runtime.RESERVED_PER_PROCESSOR * usable_processors()
            + runtime.RESERVED_PER_THREAD * settings.threads * len(backends),
        ),
        part("runtime", sum(runtime.LIBRARY[name] for name in libraries)),
        part(
            "tokenizer",
            tokenizer,
            load_bytes=runtime.PYTHON + tokenizer + runtime.TOKENIZER_BUILD_PER_TOKEN * target.n_vocab,
        ),
    ]
    stores = runtime.LOOKUP_PER_TOKEN * settings.n_ctx if settings.lookup else 0
    stores += runtime.HISTORY if settings.history else 0
    if stores:
        parts.append(part("drafter stores", stores, filled_later=True))
    if settings.parked:
        # llama.cpp holds two sequences twice while they change places.
        n_bytes = settings.parked * (2 if "llama" in libraries else 1)
        parts.append(
            Component(owner=Owner.PROCESS, name="parked chats", committed_bytes=n_bytes, filled_later=True),
        )
    return parts
