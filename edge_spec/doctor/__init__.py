"""What this machine makes of a model: memory bandwidth, threads, what passes cost, and on which backend."""

from edge_spec.doctor.bandwidth import read_bandwidth
from edge_spec.doctor.comparison import BackendFigures, Comparison, ModelComparison, compare
from edge_spec.doctor.examination import Examination, ModelTimes, examine
from edge_spec.doctor.passes import PassTime, time_passes

__all__ = [
    "BackendFigures",
    "Comparison",
    "Examination",
    "ModelComparison",
    "ModelTimes",
    "PassTime",
    "compare",
    "examine",
    "read_bandwidth",
    "time_passes",
]
