"""Step C: the gate, its file, its fit, and the budgets it is fitted for."""
