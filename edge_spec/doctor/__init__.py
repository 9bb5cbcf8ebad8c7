"""What this machine makes of a model: memory bandwidth, threads, and what passes cost."""

from edge_spec.doctor.bandwidth import read_bandwidth
from edge_spec.doctor.examination import Examination, ModelTimes, examine
from edge_spec.doctor.passes import PassTime, time_passes

__all__ = ["Examination", "ModelTimes", "PassTime", "examine", "read_bandwidth", "time_passes"]
