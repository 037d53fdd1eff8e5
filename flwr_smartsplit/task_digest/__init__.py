"""What a task is made of, as texts that client, edge and strategy compare."""
