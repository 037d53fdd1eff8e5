"""A run's record: the log, the journal, curves."""
