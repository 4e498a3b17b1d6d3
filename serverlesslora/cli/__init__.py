"""The command line: `serverlesslora serve`, and small clients of a server's admin API."""
