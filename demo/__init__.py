"""`make demo`: the whole product once, through its real parts, on the small model of tests/assets."""
