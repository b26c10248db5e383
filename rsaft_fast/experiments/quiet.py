"""Prepares a process on import, as the command line does for its own; for the server that forks runs, which imports."""

from rsaft_fast.process import prepare_process

prepare_process()
