"""Everything of the operator that does I/O: reads (`observe`), writes (`enact`), events and the process itself (`main`)."""
