"""What a tuning run remembers: trials, budgets, device time, and which held-out items were opened before."""
