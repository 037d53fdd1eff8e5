"""The proof that a cut changes nothing: every route beside the stock model."""
