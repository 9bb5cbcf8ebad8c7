"""The parts of `tools/peers.py`: contenders in processes of their own, and what they are compared by."""
