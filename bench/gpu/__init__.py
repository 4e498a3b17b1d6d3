"""The sections of `bench/gpu_check.py`: each runs in a process of its own and reports checks and numbers."""
