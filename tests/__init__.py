from tests import triton_interpreter  # noqa: F401  (before anything imports Triton, as transformers does)
