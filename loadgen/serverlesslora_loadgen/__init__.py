"""Load generator for OpenAI-compatible servers; speaks HTTP only."""
