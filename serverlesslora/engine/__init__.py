"""The synchronous inference engine inside a worker."""
