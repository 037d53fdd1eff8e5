"""quickstart: four devices with different memory train one model."""
