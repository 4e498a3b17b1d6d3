"""The Triton programs themselves; their shapes and meaning are told where they are launched."""
