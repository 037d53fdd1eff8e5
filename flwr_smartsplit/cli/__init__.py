"""The command line: what a model costs at each cut, and proof that cuts are exact."""
