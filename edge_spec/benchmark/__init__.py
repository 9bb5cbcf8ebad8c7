"""Plain and speculative decoding side by side: the prompts, the runs, their figures."""

from edge_spec.benchmark.figures import Report, summarise
from edge_spec.benchmark.runs import Pair, Run, compare
from edge_spec.benchmark.workload import Prompt, choose, read_workload, sample_workload

__all__ = ["Pair", "Prompt", "Report", "Run", "choose", "compare", "read_workload", "sample_workload", "summarise"]
