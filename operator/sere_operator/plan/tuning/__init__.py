"""When to tune, the objects of a tuning run, and what its result means. Pure."""
