"""What a run cost, by one file of prices, and what other ways to serve the same requests would have."""
