"""What a step will cost, found by a dry run that allocates nothing."""
