"""Plain and speculative decoding side by side: the prompts, the runs, their figures."""

from edge_spec.benchmark.figures import Report, summarise
from edge_spec.benchmark.repeats import RepeatedRatio, Repeats, median_interval, summarise_repeats, worst_prompts
from edge_spec.benchmark.runs import Pair, Run, compare, repeat
from edge_spec.benchmark.workload import Prompt, choose, read_workload, sample_workload

__all__ = [
    "Pair",
    "Prompt",
    "RepeatedRatio",
    "Repeats",
    "Report",
    "Run",
    "choose",
    "compare",
    "median_interval",
    "read_workload",
    "repeat",
    "sample_workload",
    "summarise",
    "summarise_repeats",
    "worst_prompts",
]
