"""The CUDA device: Triton kernels, adapters in slots, an elastic KV pool, decode steps as graphs."""
