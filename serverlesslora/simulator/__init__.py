"""A day of traffic in seconds: discrete events over functions, domains and devices, decided by the server's policies.

Requests are simulated, not tokens: every device has a token clock that running sequences share. Nothing here imports
torch; numpy is used for reading traces and for percentiles only.
"""
