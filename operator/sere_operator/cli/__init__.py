"""`kubectl sere` and `sere operator`: commands for people, beside the operator and without it."""
