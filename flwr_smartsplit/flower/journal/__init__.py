"""What a round leaves behind: the log, the journal, curves."""
