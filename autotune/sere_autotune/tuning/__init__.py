"""What a tuning run is told: tuning.yaml and the flags as one model, and the space of policies that follows from it."""
