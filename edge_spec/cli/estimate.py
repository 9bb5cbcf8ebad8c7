"""`edge-spec estimate`: whether a model fits, and how long a context can be, before anything is fetched or loaded."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from edge_spec.cli.console import DOES_NOT_FIT, print_json, print_note
from edge_spec.cli.options import BackendChoice, BackendName
from edge_spec.errors import UsageError
from edge_spec.sizes import format_size, parse_size

if TYPE_CHECKING:
    from edge_spec.backend_choice import BackendTimes
    from edge_spec.export.recipe import Recipe
    from edge_spec.memory.devices import Device
    from edge_spec.memory.estimate import Estimate
    from edge_spec.memory.facts import ModelFacts
    from edge_spec.memory.training import TrainingEstimate
    from edge_spec.store import Store


_DEVICE_THREADS = 4
"""Of a device whose cores are not asked for: what phones and small boards run a model on."""


class TrainingKind(StrEnum):
    """What fine-tuning changes."""

    FULL = "full"
    LORA = "lora"


def estimate(
    *,
    model: Annotated[
        str,
        typer.Argument(
            help="A name (a pair's counts its draft too), owner/repo:file.gguf on the hub (its header is fetched), "
            "a GGUF, an export's or a checkpoint's folder, or a config.json."
        ),
    ],
    draft: Annotated[str | None, typer.Option(help="The draft model, named like the model.")] = None,
    backend: Annotated[
        BackendChoice, typer.Option(help="The library that would run it; auto: as it would be chosen on this machine.")
    ] = BackendChoice.AUTO,
    draft_backend: Annotated[
        BackendName | None, typer.Option(help="The draft's (default: the target's; onnx beside openvino).")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="How exported weights are stored: int4, int8 or exact (default: by the source).")
    ] = None,
    ctx: Annotated[
        int | None, typer.Option("--ctx", min=2, help="Window in tokens (default: 4096, or what the model has).")
    ] = None,
    kv: Annotated[str | None, typer.Option(help="Type of the cache's elements: f32, f16, q8_0, ...")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt in one pass.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: the physical cores).")] = None,
    history: Annotated[bool, typer.Option("--history", help="Count the index of past answers.")] = False,
    parked: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Count what caches of other chats may hold, like 256MiB.")
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(
            help="Budget: a size like 3GiB, or a device like pixel-8 (default: what is free on this machine)."
        ),
    ] = None,
    training: Annotated[TrainingKind | None, typer.Option(help="Memory of fine-tuning instead.")] = None,
    lora_rank: Annotated[int, typer.Option(min=1, help="With --training lora: the adapters' rank.")] = 16,
    sequence: Annotated[int, typer.Option(min=1, help="With --training: tokens of a sequence.")] = 512,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="With --training: activations are computed twice, not kept.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a model would take of memory, whether that fits, and what would make it smaller.

    Nothing is loaded: a header is enough. Exit code 0: it fits; 3: it does not.
    """
    from edge_spec.memory.devices import parse_budget
    from edge_spec.memory.locate import find_facts
    from edge_spec.store import Store

    store = Store()
    names = store.expand(model)
    if len(names) == 2 and draft is None:
        draft = names[1]
    budget_bytes, device = parse_budget(ram) if ram is not None else (_free_bytes(), None)
    target = find_facts(store, names[0])
    if training is not None:
        from edge_spec.memory.training import TrainingSettings, estimate_training

        if draft is not None and len(names) < 2:
            raise UsageError("--training is of one model: drop --draft")
        chosen = TrainingSettings(
            lora_rank=lora_rank if training is TrainingKind.LORA else 0,
            batch=batch or 1,
            sequence=sequence,
            checkpointing=checkpointing,
        )
        _tell_training(estimate_training(target, chosen), budget_bytes, as_json=as_json)
        return
    if draft_backend is not None and draft is None:
        raise UsageError("--draft-backend is for the draft model, and none is named")
    library, drafts_library = backend.value, draft_backend.value if draft_backend else None
    if backend is BackendChoice.AUTO:
        library, drafts_library = _choose(
            store, names[0], target, draft, draft_backend=drafts_library, recipe=recipe, kv=kv
        )
    counted = _count(
        store,
        target,
        draft,
        backend=library,
        draft_backend=drafts_library,
        recipe=recipe,
        ctx=ctx,
        kv=kv,
        batch=batch,
        threads=threads,
        history=history,
        parked=parse_size(parked) if parked is not None else 0,
        device=device,
    )
    _tell(counted, budget_bytes, device, store, as_json=as_json)


def _free_bytes() -> int:
    """What this machine would leave to an engine."""
    from edge_spec.memory.budget import find_budget

    return find_budget().held.n_bytes


def _choose(
    store: Store,
    name: str,
    target: ModelFacts,
    draft: str | None,
    *,
    draft_backend: str | None,
    recipe: str | None,
    kv: str | None,
) -> tuple[str, str | None]:
    """The backends that an engine would choose here for the target and the draft; says how it came about."""
    from edge_spec.backend_choice import BackendProfile, able_backends, choose_backends, weights_key
    from edge_spec.export.recipe import RECIPES, find_recipe
    from edge_spec.loading import BACKENDS
    from edge_spec.memory.locate import find_facts

    profile, asked = BackendProfile(store.cache_dir), find_recipe(recipe) if recipe else None
    running = tuple(name for name in BACKENDS if name != "llama" or target.runs_on_llama)

    def times(name: str, facts: ModelFacts, recipe: Recipe | None) -> dict[str, BackendTimes]:
        sha256 = facts.sha256 or (store.resolve(name).sha256 if store.is_path(name) else None)
        return profile.get(weights_key(sha256, facts.recipe or recipe)) if sha256 else {}

    able = able_backends(running, recipe=asked, kv=kv)
    drafting = times(draft, find_facts(store, draft), RECIPES["draft"]) if draft is not None else None
    choice = choose_backends(able, times(name, target, asked), drafting, draft_backend)
    for note in choice.notes:
        print_note(note)
    return choice.backend, choice.draft_backend if draft is not None else None


def _count(
    store: Store,
    target: ModelFacts,
    draft: str | None,
    device: Device | None,
    *,
    backend: str,
    draft_backend: str | None,
    recipe: str | None,
    ctx: int | None,
    kv: str | None,
    batch: int | None,
    threads: int | None,
    history: bool,
    parked: int,
) -> Estimate:
    """The estimate of what was asked for. Raises UsageError for what contradicts the model."""
    from edge_spec.cores import check_threads
    from edge_spec.export.recipe import find_recipe
    from edge_spec.loading import DEFAULT_N_CTX
    from edge_spec.memory.estimate import estimate as count
    from edge_spec.memory.locate import find_facts
    from edge_spec.memory.parts import Settings

    if recipe is not None and (backend == "llama" or target.recipe is not None):
        raise UsageError("--recipe is for a model that is exported; this one is run as it is")
    if ctx is not None and ctx > target.n_ctx_train:
        raise UsageError(f"--ctx {ctx}: {target.name} takes up to {target.n_ctx_train} tokens")
    settings = Settings(
        backend=backend,
        draft_backend=draft_backend,
        n_ctx=ctx or min(DEFAULT_N_CTX, target.n_ctx_train),
        kv=kv,
        threads=_DEVICE_THREADS if device is not None and threads is None else check_threads(threads),
        recipe=find_recipe(recipe) if recipe else None,
        history=history,
        parked=parked,
    )
    if batch is not None:
        settings = replace(settings, batch=batch)
    if device is not None:
        settings = replace(settings, machine=device.machine)
    return count(target, find_facts(store, draft) if draft is not None else None, settings)


def _tell(counted: Estimate, budget_bytes: int, device: Device | None, store: Store, *, as_json: bool) -> None:
    from edge_spec.cli.estimate_report import Report
    from edge_spec.memory.levers import find_levers
    from edge_spec.memory.speed import predict_speed

    report = Report(
        counted,
        budget_bytes,
        # Mapped files come on top of a budget that is asked for, as long as this machine has room for them.
        budget_bytes if device is not None else max(budget_bytes, _free_bytes()),
        counted.largest_n_ctx(budget_bytes),
        find_levers(counted),
        predict_speed(counted, store, device),
    )
    if as_json:
        print_json(report.to_json())
    else:
        report.print()
    if not report.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _tell_training(counted: TrainingEstimate, budget_bytes: int, *, as_json: bool) -> None:
    parts = {
        "weights": counted.weights_bytes,
        "gradients": counted.gradients_bytes,
        "optimiser": counted.optimiser_bytes,
        "activations": counted.activations_bytes,
    }
    fits = counted.total_bytes <= budget_bytes
    sizes = f"{format_size(counted.total_bytes)} of {format_size(budget_bytes)}"
    verdict = f"{'fits' if fits else 'does not fit'}: {sizes}; {counted.trained_parameters:,} parameters are trained"
    if as_json:
        components = [
            {"owner": "target", "name": name, "committed_bytes": size, "mapped_bytes": 0, "source": "formula"}
            for name, size in parts.items()
        ]
        print_json(
            {
                "fits": fits,
                "verdict": verdict,
                "budget_bytes": budget_bytes,
                "committed_bytes": counted.total_bytes,
                "trained_parameters": counted.trained_parameters,
                "components": components,
            }
        )
    else:
        for name, size in parts.items():
            print(f"{name:12}{format_size(size):>10}")
        print(verdict)
    if not fits:
        raise typer.Exit(DOES_NOT_FIT)
