"""Step C: the gate, its file, its fit, the frontier, and the search for a budget."""
