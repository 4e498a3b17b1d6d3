"""The zygote that turns a prepared process into workers by fork."""
