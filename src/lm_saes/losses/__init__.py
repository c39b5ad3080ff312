"""Loss terms: functions of the record of a forward pass."""
