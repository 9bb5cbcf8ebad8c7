"""Options that `generate` and `chat` share, and what they are turned into."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

from edge_spec.errors import UsageError
from edge_spec.types import SamplingParams

if TYPE_CHECKING:
    from edge_spec.cli.progress import ProgressDisplay
    from edge_spec.engine import Engine

_MODEL = "Model"
_SPECULATION = "Speculation"
_TEXT = "Text"
_SAMPLING = "Sampling"


class BackendName(StrEnum):
    """Libraries that can run a model."""

    ONNX = "onnx"
    NATIVE = "native"
    OPENVINO = "openvino"
    LLAMA = "llama"


class BackendChoice(StrEnum):
    """Libraries that can run a model, and the choice among them."""

    AUTO = "auto"
    ONNX = "onnx"
    NATIVE = "native"
    OPENVINO = "openvino"
    LLAMA = "llama"


class OnFull(StrEnum):
    """What a conversation does when it outgrows the window."""

    TURNS = "turns"
    SINKS = "sinks"
    ERROR = "error"


class OnFullPrompt(StrEnum):
    """What a single prompt and its answer do when they outgrow the window."""

    SINKS = "sinks"
    ERROR = "error"


class DrafterName(StrEnum):
    """Where proposed tokens come from."""

    NONE = "none"
    LOOKUP = "lookup"
    REFERENCE = "reference"
    HISTORY = "history"
    MODEL = "model"
    CASCADE = "cascade"
    AUTO = "auto"


PairOption = Annotated[
    str | None,
    typer.Option(help="A target with its draft, by name (default: the default pair).", rich_help_panel=_MODEL),
]
TargetOption = Annotated[
    str | None,
    typer.Option(help="The model that answers: a name, a GGUF file or an export's folder.", rich_help_panel=_MODEL),
]
DraftOption = Annotated[
    str | None, typer.Option(help="The small model that proposes, given like the target.", rich_help_panel=_MODEL)
]
BackendOption = Annotated[
    BackendChoice,
    typer.Option(
        help="The library that runs the models; auto: native, or what doctor --compare found faster.",
        rich_help_panel=_MODEL,
    ),
]
DraftBackendOption = Annotated[
    BackendName | None,
    typer.Option(
        help="The library that runs the draft (default: the target's; onnx beside openvino).", rich_help_panel=_MODEL
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        help="How exported weights are stored: int4, int8 or exact (default: follows the source).",
        rich_help_panel=_MODEL,
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads (default: the physical cores).", rich_help_panel=_MODEL)
]
CtxOption = Annotated[
    int | None,
    typer.Option(
        "--ctx", min=1, help="Window in tokens (default: 4096, or what the model has).", rich_help_panel=_MODEL
    ),
]
RamOption = Annotated[
    str | None,
    typer.Option(
        help="Most memory to hold: a size like 3GiB, or a device's name (default: what the machine has to spare).",
        rich_help_panel=_MODEL,
    ),
]
KvOption = Annotated[
    str | None,
    typer.Option(
        help="How keys and values are stored, the first unless given: f16 or f32 (native), f32 or q8 (onnx), f16, f32 "
        "or u8 (openvino), f16, f32, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0 (llama).",
        rich_help_panel=_MODEL,
    ),
]
OnFullOption = Annotated[
    OnFull,
    typer.Option(
        help="What happens to a conversation that outgrows the window: turns drops the oldest but the first, "
        "sinks evicts the middle from the cache, error refuses the turn.",
        rich_help_panel=_TEXT,
    ),
]
OnFullPromptOption = Annotated[
    OnFullPrompt,
    typer.Option(
        "--on-full",
        help="What happens when prompt and text outgrow the window: error refuses the prompt or ends the text, "
        "sinks evicts the middle from the cache and goes on.",
        rich_help_panel=_TEXT,
    ),
]
KeepOption = Annotated[
    float | None,
    typer.Option(
        help="Share of a prompt to read, in (0, 1): the draft model finds what tells least, and it is left out.",
        rich_help_panel=_TEXT,
    ),
]
NoPadOption = Annotated[
    bool,
    typer.Option(
        "--no-pad",
        help="Unpadded passes: faster, but in a near tie the text may differ from other drafters'.",
        rich_help_panel=_SPECULATION,
    ),
]
DrafterOption = Annotated[DrafterName, typer.Option(help="What proposes tokens.", rich_help_panel=_SPECULATION)]
DraftTokensOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens proposed a step.", rich_help_panel=_SPECULATION)
]
ReferenceOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="A text file that answers may copy from, which makes them faster; may be given several times.",
        rich_help_panel=_SPECULATION,
    ),
]
HistoryOption = Annotated[
    bool,
    typer.Option(
        "--history",
        help="Keep the answers on this machine, for you alone, and let later ones copy from them.",
        rich_help_panel=_SPECULATION,
    ),
]
SystemOption = Annotated[str | None, typer.Option(help="System message.", rich_help_panel=_TEXT)]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        "-n",
        min=1,
        help="Most tokens to write (default: until the window is full).",
        rich_help_panel=_TEXT,
    ),
]
StopOption = Annotated[
    list[str] | None, typer.Option(help="Stop before this text; may be given several times.", rich_help_panel=_TEXT)
]
TemperatureOption = Annotated[
    float | None, typer.Option(min=0, help="0 always takes the most likely token.", rich_help_panel=_SAMPLING)
]
TopKOption = Annotated[
    int | None, typer.Option(min=0, help="Keep the k most likely tokens; 0 keeps all.", rich_help_panel=_SAMPLING)
]
TopPOption = Annotated[
    float | None,
    typer.Option(help="Keep the most likely tokens up to this mass, in (0, 1].", rich_help_panel=_SAMPLING),
]
MinPOption = Annotated[
    float | None,
    typer.Option(help="Drop tokens below this share of the most likely one, in [0, 1).", rich_help_panel=_SAMPLING),
]
RepetitionPenaltyOption = Annotated[
    float | None, typer.Option(help="Scales down tokens of the context; 1 does nothing.", rich_help_panel=_SAMPLING)
]
PresencePenaltyOption = Annotated[
    float | None, typer.Option(help="Subtracted once from tokens already written.", rich_help_panel=_SAMPLING)
]
FrequencyPenaltyOption = Annotated[
    float | None, typer.Option(help="Subtracted for each time a token was written.", rich_help_panel=_SAMPLING)
]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.", rich_help_panel=_SAMPLING)]


class SamplingChoices(TypedDict):
    """The sampling options as they were typed; None was not given. The keys are the fields of `SamplingParams`."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None


def given(choices: SamplingChoices) -> dict[str, Any]:
    """Only what the user typed, ready for `dataclasses.replace`. Raises UsageError for a value out of range."""
    chosen: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
    SamplingParams(**chosen)
    return chosen


def idle_choices(chosen: dict[str, Any], sampling: SamplingParams) -> str | None:
    """A remark on options that greedy decoding leaves without effect, None if there are none."""
    idle = [name for name in ("top_k", "top_p", "min_p", "seed") if name in chosen]
    if sampling.temperature > 0 or not idle:
        return None
    names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
    return f"no effect at temperature 0: {names}; set --temperature to sample"


def stop_strings(stop: Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings. Raises UsageError for an empty one, which would end every text at once."""
    if stop and not all(stop):
        raise UsageError("--stop needs a text that is not empty")
    return tuple(stop or ())


COPYING = (DrafterName.AUTO, DrafterName.REFERENCE)
"""Drafters that copy from references."""


def reference_texts(files: Sequence[Path] | None, drafter: DrafterName) -> tuple[str, ...]:
    """The files' texts. Raises UsageError for one that cannot be read, and where the drafter has no use for them."""
    if files and drafter not in COPYING:
        raise UsageError(f"--drafter {drafter.value} copies from no reference: drop one of the two")
    if drafter is DrafterName.REFERENCE and not files:
        raise UsageError("--drafter reference needs a text to copy from: give --reference FILE")
    return tuple(map(read_reference, files or ()))


def read_reference(file: Path) -> str:
    """The text of one file. Raises UsageError."""
    try:
        text = file.expanduser().read_text("utf-8")
    except (OSError, RuntimeError, ValueError) as exc:
        raise UsageError(f"the reference {file} cannot be read: {exc}") from exc
    if not text.strip():
        raise UsageError(f"the reference {file} is empty")
    return text


def load_engine(
    progress: ProgressDisplay,
    *,
    pair: str | None,
    target: str | None,
    draft: str | None,
    backend: BackendChoice,
    draft_backend: BackendName | None,
    drafter: DrafterName,
    draft_tokens: int | None,
    recipe: str | None,
    threads: int | None,
    ctx: int | None,
    ram: str | None,
    no_pad: bool,
    history: bool = False,
    kv: str | None = None,
) -> Engine:
    """`Engine.load` with the command line's options. Raises what that raises, and UsageError for contradictions."""
    if pair is not None and target is not None:
        raise UsageError("--pair names a target already: give --pair or --target, not both")
    from edge_spec.engine import Engine

    with progress:
        return Engine.load(
            pair,
            target=_name_or_path(target),
            draft=_name_or_path(draft),
            backend=backend.value,
            draft_backend=draft_backend.value if draft_backend else None,
            drafter=drafter.value,
            draft_tokens=draft_tokens,
            recipe=recipe,
            threads=threads,
            n_ctx=ctx,
            ram=ram,
            pad_rows=not no_pad,
            history=history,
            kv=kv,
            on_progress=progress.stage,
        )


def _name_or_path(model: str | None) -> str | None:
    return str(Path(model).expanduser()) if model is not None and model.startswith("~") else model
