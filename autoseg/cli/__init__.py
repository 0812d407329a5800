"""The command line: arguments, commands, and the helpers around a run."""
