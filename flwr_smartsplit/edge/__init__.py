"""The host of the segments that are not on the device, and how it is reached."""
