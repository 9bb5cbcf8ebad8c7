"""What the answers say about the contenders: figures by task, and ratios inside one run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peer_bench.answer import Answer
from peer_bench.prompts import Prompt

Answers = Mapping[str, Answer]
"""One contender's answers by prompt id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One contender over some prompts. None where nothing was measured (no answer longer than one token, no draft)."""

    prompts: int
    generated_tokens: int
    tokens_per_s: float | None
    """All decoded tokens over all decode time: (generated - 1) / (first token to last), summed before dividing."""
    ttft_s: float
    """Median over the prompts."""
    tokens_per_step: float | None
    acceptance_rate: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How one contender compares with another on the same prompts; above 1 is faster, but slower for `ttft`."""

    tokens_per_s: float | None
    """Of the overall rates."""
    median: float | None
    """Of the prompts' ratios of decode tokens/s."""
    geometric_mean: float | None
    worst: float | None
    """The smallest of the prompts' ratios of decode tokens/s."""
    end_to_end: float
    """Geometric mean of the prompts' ratios of tokens/s over the whole request, prompt included."""
    ttft: float
    """Median of the prompts' ratios of the time to first token."""
    same_answers: int
    """Prompts that both answered with the same token ids."""
    prompts: int


def tokens_per_s(answer: Answer) -> float | None:
    """Decode rate of one answer; None if it has fewer than two tokens."""
    decoded = len(answer.token_ids) - 1
    return decoded / answer.decode_s if decoded > 0 and answer.decode_s > 0 else None


def _whole_rate(answer: Answer) -> float:
    return len(answer.token_ids) / answer.wall_s


def summarise(answers: Answers, prompts: Sequence[Prompt]) -> Figures:
    """Figures of one contender over `prompts`, which it must all have answered."""
    chosen = [answers[prompt.id] for prompt in prompts]
    decoded = sum(max(0, len(answer.token_ids) - 1) for answer in chosen)
    decode_s = sum(answer.decode_s for answer in chosen)
    steps = sum(answer.steps for answer in chosen)
    drafted = sum(answer.drafted for answer in chosen)
    accepted = sum(answer.accepted for answer in chosen)
    return Figures(
        prompts=len(chosen),
        generated_tokens=sum(len(answer.token_ids) for answer in chosen),
        tokens_per_s=decoded / decode_s if decode_s > 0 else None,
        ttft_s=statistics.median(answer.ttft_s for answer in chosen),
        tokens_per_step=1 + accepted / steps if steps else None,
        acceptance_rate=accepted / drafted if drafted else None,
    )


def compare(ours: Answers, theirs: Answers, prompts: Sequence[Prompt]) -> Ratio:
    """`ours` over `theirs`."""
    pairs = [(ours[prompt.id], theirs[prompt.id]) for prompt in prompts]
    speedups = [
        mine / other
        for mine, other in ((tokens_per_s(left), tokens_per_s(right)) for left, right in pairs)
        if mine is not None and other is not None
    ]
    left, right = summarise(ours, prompts).tokens_per_s, summarise(theirs, prompts).tokens_per_s
    return Ratio(
        tokens_per_s=left / right if left is not None and right is not None else None,
        median=statistics.median(speedups) if speedups else None,
        geometric_mean=statistics.geometric_mean(speedups) if speedups else None,
        worst=min(speedups, default=None),
        end_to_end=statistics.geometric_mean(_whole_rate(mine) / _whole_rate(other) for mine, other in pairs),
        ttft=statistics.median(mine.ttft_s / other.ttft_s for mine, other in pairs),
        same_answers=sum(mine.token_ids == other.token_ids for mine, other in pairs),
        prompts=len(pairs),
    )


def by_task(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Prompts of each task in order, then all of them under `all` if there are several tasks."""
    tasks: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        tasks.setdefault(prompt.task, []).append(prompt)
    return tasks | {"all": list(prompts)} if len(tasks) > 1 else tasks


def disagreements(answers: Mapping[str, Answers], prompts: Sequence[Prompt]) -> list[str]:
    """What makes a comparison unfair: prompts that were not the same ids' number, time spent outside the clock."""
    found = []
    for prompt in prompts:
        lengths = {name: answers[name][prompt.id].prompt_tokens for name in answers}
        if len(set(lengths.values())) > 1:
            found.append(f"{prompt.id}: the contenders read prompts of different lengths: {lengths}")
    for name, given in answers.items():
        wall_s = sum(given[prompt.id].wall_s for prompt in prompts)
        timed_s = sum(given[prompt.id].ttft_s + given[prompt.id].decode_s for prompt in prompts)
        if wall_s > 1.05 * timed_s:
            found.append(f"{name} spent {wall_s - timed_s:.1f} of {wall_s:.1f} s outside prefill and decoding")
    return found


def as_json(
    answers: Mapping[str, Answers], prompts: Sequence[Prompt], processes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything, for `--json`: figures and ratios by task, memory, every answer."""
    reference = next(iter(answers))
    return {
        "contenders": {name: dict(about) for name, about in processes.items()},
        "tasks": {
            task: {
                "figures": {name: asdict(summarise(answers[name], chosen)) for name in answers},
                "ratios": {
                    f"{reference} / {name}": asdict(compare(answers[reference], answers[name], chosen))
                    for name in answers
                    if name != reference
                },
            }
            for task, chosen in by_task(prompts).items()
        },
        "warnings": disagreements(answers, prompts),
        "answers": {name: {key: asdict(answer) for key, answer in answers[name].items()} for name in answers},
    }


def as_text(
    answers: Mapping[str, Answers], prompts: Sequence[Prompt], processes: Mapping[str, Mapping[str, Any]]
) -> str:
    """Tables for a terminal."""
    reference = next(iter(answers))
    lines = []
    for task, chosen in by_task(prompts).items():
        lines += [f"{task}: {len(chosen)} prompts", ""]
        columns = ("", "tok/s", "ttft s", "tok/step", "accepted", "tokens")
        lines += _table(columns, [_figures_row(name, summarise(answers[name], chosen)) for name in answers])
        others = [name for name in answers if name != reference]
        if others:
            head = (f"{reference} over", "tok/s", "median", "geo. mean", "worst", "end to end", "ttft", "same answers")
            rows = [_ratio_row(name, compare(answers[reference], answers[name], chosen)) for name in others]
            lines += ["", *_table(head, rows)]
        lines.append("")
    lines += _table(
        ("memory, MiB", "peak RSS", "anonymous", "mapped", "anon. at load", "load s"),
        [_memory_row(name, about) for name, about in processes.items()],
    )
    lines += ["", *(f"{name}: {about['about']}" for name, about in processes.items())]
    lines += [f"warning: {line}" for line in disagreements(answers, prompts)]
    return "\n".join(lines)


def _figures_row(name: str, figures: Figures) -> tuple[str, ...]:
    return (
        name,
        _number(figures.tokens_per_s, 1),
        _number(figures.ttft_s, 3),
        _number(figures.tokens_per_step, 2),
        "-" if figures.acceptance_rate is None else f"{figures.acceptance_rate:.0%}",
        str(figures.generated_tokens),
    )


def _ratio_row(name: str, ratio: Ratio) -> tuple[str, ...]:
    ratios = (ratio.tokens_per_s, ratio.median, ratio.geometric_mean, ratio.worst, ratio.end_to_end, ratio.ttft)
    return (name, *(_number(value, 2) for value in ratios), f"{ratio.same_answers}/{ratio.prompts}")


def _memory_row(name: str, about: Mapping[str, Any]) -> tuple[str, ...]:
    answering, loading = about["peak_answering"], about["peak_loading"]
    sizes = (
        max(answering["peak_rss_bytes"], loading["peak_rss_bytes"]),
        answering["anonymous_bytes"],
        answering["mapped_bytes"],
        loading["anonymous_bytes"],
    )
    return (name, *(f"{size / 2**20:.0f}" for size in sizes), _number(about["load_s"], 1))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, the first to the left."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(row, widths, strict=True)] for row in (head, *rows))
    ]
