"""Backends: a model with its KV cache behind one protocol. Each imports its own library, lazily."""
