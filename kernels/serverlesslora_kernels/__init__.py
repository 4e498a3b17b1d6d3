"""Segmented LoRA matmul, paged attention and small-batch linear kernels with plain-torch oracles."""
