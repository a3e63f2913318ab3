"""The `sere` command, and the subcommands of this package: calibrate, similarity, serve, status and apply."""
