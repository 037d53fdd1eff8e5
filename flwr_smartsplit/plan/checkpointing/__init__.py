"""What a device computes twice so that its route fits its memory."""
