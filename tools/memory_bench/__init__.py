"""The parts of `tools/memory_grid.py`: runs in processes of their own, and what of their memory was foretold."""
