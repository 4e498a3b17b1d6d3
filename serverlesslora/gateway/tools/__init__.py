"""Tool calls: what a request offers to call, and how calls and reasoning are read from what a model writes.

Everything here is pure. A *format* (`formats.py`) is a coroutine that reads a model's text through a `Reader` and says
what it found; it is written as if all text were there and is suspended where more is needed, so what it finds does not
depend on how the text was cut. The idea of a sans-io parser is h11's; the formats are those that the models' own chat
templates describe.
"""
