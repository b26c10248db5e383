"""What each subcommand does; `rsaft_fast.cli` imports the one that is asked for."""
