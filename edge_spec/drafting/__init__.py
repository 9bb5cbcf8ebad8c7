"""Drafters: one file each, all implementing `edge_spec.decoding.drafter.Drafter`; and the planner that chooses."""

from edge_spec.decoding.drafter import Drafter, NoDrafter, Request
from edge_spec.drafting.cascade import CascadeDrafter
from edge_spec.drafting.costs import Costs
from edge_spec.drafting.growth import Growth, fit_growth
from edge_spec.drafting.history import HistoryDrafter, PastAnswers
from edge_spec.drafting.lookup import LookupDrafter
from edge_spec.drafting.model import ModelDrafter
from edge_spec.drafting.planner import Planner
from edge_spec.drafting.reference import ReferenceDrafter

__all__ = [
    "CascadeDrafter",
    "Costs",
    "Drafter",
    "Growth",
    "HistoryDrafter",
    "LookupDrafter",
    "ModelDrafter",
    "NoDrafter",
    "PastAnswers",
    "Planner",
    "ReferenceDrafter",
    "Request",
    "fit_growth",
]
