"""The client: requests that are ready before the run, sent at their times, and what became of each."""
