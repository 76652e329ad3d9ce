"""The command line `srp`: `main` runs it, `command` says what a command is, the other files hold the commands."""
