"""The command line `srp`: `main` runs it, `command` defines what a command is, the other files have the commands."""
