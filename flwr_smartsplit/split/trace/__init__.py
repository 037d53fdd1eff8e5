"""From a module's forward to units: what torch.fx sees, checked by a dry run."""
