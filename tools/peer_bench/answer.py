"""What goes over the pipes between the benchmark and its contenders."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every contender is loaded with. `n_ctx` in tokens."""

    pair: str
    threads: int
    n_ctx: int
    llama_server: str | None = None
    """llama.cpp's own server program, for the contenders that are run by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One greedy answer to one prompt, from an empty cache. Times in seconds.

    `ttft_s` runs from the request to the first token, `decode_s` from the first token to the last; `wall_s` is the
    whole request, so that what a contender spends outside the two shows. `steps` counts decodes of the target.
    """

    token_ids: list[int]
    text: str
    prompt_tokens: int
    ttft_s: float
    decode_s: float
    wall_s: float
    steps: int
    drafted: int = 0
    accepted: int = 0
