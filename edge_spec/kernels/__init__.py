"""The native backend's kernels: C for the processor at hand, compiled at the first use and kept.

vectors.h      vectors, and products of 4- and 8-bit weights, for each kind of processor
activations.h  activations as 8-bit levels
products.h     a matrix times the activations of a pass
attention.h    rotary embedding, attention over the cache
pass.c         the steps of a pass, and the threads that go through them
"""
