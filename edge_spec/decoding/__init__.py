"""Speculative decoding over any `CausalLM`: the loop, the cache's session, verification and sampling."""

from edge_spec.decoding.decoder import DecodeStats, SpeculativeDecoder, Step
from edge_spec.decoding.drafter import Drafter, NoDrafter, Request
from edge_spec.decoding.history import History
from edge_spec.decoding.sampling import Sampler, make_sampler
from edge_spec.decoding.session import Session
from edge_spec.decoding.stop import StopStrings
from edge_spec.decoding.verify import verify

__all__ = [
    "DecodeStats",
    "Drafter",
    "History",
    "NoDrafter",
    "Request",
    "Sampler",
    "Session",
    "SpeculativeDecoder",
    "Step",
    "StopStrings",
    "make_sampler",
    "verify",
]
