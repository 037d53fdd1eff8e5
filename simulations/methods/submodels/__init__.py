"""Methods whose weak clients train a smaller model, nested in the whole one."""
