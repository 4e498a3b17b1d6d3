"""Device memory that is written once and then shared by descriptor, read-only: the CUDA twin of `sealed`."""
