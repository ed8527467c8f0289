"""From finished rows to moved weights: batches, estimates, updates, and what is counted on the way."""
