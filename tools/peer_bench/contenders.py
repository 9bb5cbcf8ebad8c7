"""Who takes part. A new peer is one class here and its line in `CONTENDERS`; it runs in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from peer_bench.answer import Answer, Settings
from peer_bench.genai import MODES as GENAI_MODES
from peer_bench.llama_cpp_server import MODES


class Contender(Protocol):
    """A loaded engine that answers greedily, every prompt from an empty cache."""

    about: str
    """What exactly runs, for the report: library, version, model, options."""

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        """Answer one user message under the model's own chat template; at most `max_tokens` tokens."""
        ...


class Ours:
    """edge_spec's engine, on the onnx backend unless told otherwise."""

    def __init__(self, settings: Settings, *, drafter: str, pad_rows: bool, backend: str = "onnx") -> None:
        from edge_spec import Engine

        self._engine = Engine.load(
            settings.pair,
            backend=backend,
            threads=settings.threads,
            n_ctx=settings.n_ctx,
            drafter=drafter,
            pad_rows=pad_rows,
        )
        self.about = f"edge_spec, {backend}, drafter {drafter}, rows {'padded' if pad_rows else 'not padded'}"

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        """See `Contender`."""
        from edge_spec.types import SamplingParams

        self._engine.reset()
        started = time.perf_counter()
        result = self._engine.generate(prompt, max_tokens=max_tokens, sampling=SamplingParams(temperature=0.0))
        wall_s = time.perf_counter() - started
        decoded = max(0, result.generated_tokens - 1)
        return Answer(
            token_ids=list(result.token_ids),
            text=result.text,
            prompt_tokens=result.prompt_tokens,
            ttft_s=result.ttft_s,
            decode_s=decoded / result.decode_tokens_per_s if result.decode_tokens_per_s else 0.0,
            wall_s=wall_s,
            steps=result.steps,
            drafted=result.drafted,
            accepted=result.accepted,
        )


def ours_pair(settings: Settings) -> Contender:
    """Speculation as a user gets it."""
    return Ours(settings, drafter="auto", pad_rows=True)


def ours_padded(settings: Settings) -> Contender:
    """Plain decoding that writes what speculation writes, bit for bit."""
    return Ours(settings, drafter="none", pad_rows=True)


def ours_plain(settings: Settings) -> Contender:
    """Plain decoding as one would run it for speed alone."""
    return Ours(settings, drafter="none", pad_rows=False)


def native_pair(settings: Settings) -> Contender:
    """Speculation on kernels of our own, where no row is padded and texts are the same all the same."""
    return Ours(settings, drafter="auto", pad_rows=True, backend="native")


def native_plain(settings: Settings) -> Contender:
    """Plain decoding on them."""
    return Ours(settings, drafter="none", pad_rows=True, backend="native")


def llama_cpp(settings: Settings) -> Contender:
    """llama.cpp without speculation."""
    from peer_bench.llama_cpp_plain import LlamaCppPlain

    return LlamaCppPlain(settings)


def llama_server(mode: str) -> Callable[[Settings], Contender]:
    """llama.cpp's own server in one of its `llama_cpp_server.MODES`."""

    def make(settings: Settings) -> Contender:
        from peer_bench.llama_cpp_server import LlamaCppServer

        return LlamaCppServer(settings, mode)

    return make


def genai(mode: str) -> Callable[[Settings], Contender]:
    """onnxruntime-genai in one of its `genai.MODES`."""

    def make(settings: Settings) -> Contender:
        from peer_bench.genai import Genai

        return Genai(settings, mode)

    return make


CONTENDERS: dict[str, Callable[[Settings], Contender]] = {
    "ours-pair": ours_pair,
    "ours-padded": ours_padded,
    "ours-plain": ours_plain,
    "native-pair": native_pair,
    "native-plain": native_plain,
    "llama.cpp": llama_cpp,
    **{f"llama-server-{mode}": llama_server(mode) for mode in MODES},
    **{f"genai-{mode}": genai(mode) for mode in GENAI_MODES},
}
DEFAULT = ("ours-pair", "ours-padded", "ours-plain", "llama.cpp")
"""Those that need no program or library beside edge_spec's own."""
