"""Where adapters come from and where they are kept: sources, transfers, and a store by digest."""
