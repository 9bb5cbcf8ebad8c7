"""Drafters: one file each. All implement `edge_spec.decoding.drafter.Drafter`."""

from edge_spec.decoding.drafter import Drafter, NoDrafter, Request
from edge_spec.drafting.chain import FirstOf
from edge_spec.drafting.lookup import LookupDrafter
from edge_spec.drafting.model import ModelDrafter

__all__ = ["Drafter", "FirstOf", "LookupDrafter", "ModelDrafter", "NoDrafter", "Request"]
