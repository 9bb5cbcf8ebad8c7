"""The parts of `tools/pruning.py`: texts that are made up, policies, and what each of them does to the answers."""
