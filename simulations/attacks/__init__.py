"""What an edge can learn of a device's inputs and labels, measured by attacking."""
