"""Plans, profiles and outcomes as Flower records, and back."""
