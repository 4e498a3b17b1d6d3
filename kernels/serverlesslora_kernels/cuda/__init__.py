"""What a step needs on a CUDA device, in Triton; the same code runs on host memory in Triton's interpreter."""
