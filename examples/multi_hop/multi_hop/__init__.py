"""multi_hop: two edges in a row, and routes of one's own choice."""
