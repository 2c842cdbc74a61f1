"""What a model says about rows: the forward pass, top-k rows, and the store that keeps them."""
