"""A fleet of measured phones, and the tables it is drawn from."""
