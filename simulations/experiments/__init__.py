"""What an experiment is, and how its clients and methods run."""
