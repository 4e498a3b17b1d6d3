"""Pure policies: plain values in, plain values out, time injected. The live server and the simulator run the same ones.

Nothing here reads a clock, opens a socket, starts a thread or imports torch; every decision carries its reason.
"""
