"""The operator's judgement, pure: `decide(snapshot) -> Plan`. No kopf, no kubernetes, no I/O, no clock of its own."""
