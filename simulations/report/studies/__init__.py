"""What is said of a study: claims, tables, pictures and the page."""
