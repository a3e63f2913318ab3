"""What tuning can gain at most on this engine, found in about a minute, before hours are spent on it."""
