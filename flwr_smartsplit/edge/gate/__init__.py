"""Who may ask an edge what: it stands before the service at every host."""
