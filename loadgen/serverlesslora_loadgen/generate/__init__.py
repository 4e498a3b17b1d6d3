"""Workloads that are made up: who is asked, when, and for how much."""
