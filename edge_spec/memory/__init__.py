"""Memory, counted before anything is loaded: what a model, its draft and the process will hold. No inference here."""

from edge_spec.memory.estimate import Estimate, estimate
from edge_spec.memory.facts import Layer, ModelFacts
from edge_spec.memory.parts import Component, Owner, Settings, Source
from edge_spec.memory.read_export import facts_of_export
from edge_spec.memory.read_gguf import facts_of_gguf

__all__ = [
    "Component",
    "Estimate",
    "Layer",
    "ModelFacts",
    "Owner",
    "Settings",
    "Source",
    "estimate",
    "facts_of_export",
    "facts_of_gguf",
]
