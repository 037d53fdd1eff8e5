"""own_model: a model of one's own, and labels that stay on the device."""
