"""The shared base model: loading it once, publishing it read-only, attaching to it."""
