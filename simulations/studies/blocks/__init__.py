"""The suite that compares training block by block with the other methods."""
