"""What a request takes: weights, activations, the memory ledger, limits, seconds."""
