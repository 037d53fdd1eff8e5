"""Tables, pictures and pages made of results."""
