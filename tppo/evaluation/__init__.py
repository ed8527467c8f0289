"""How good a policy is: several sampled answers to each held-out problem, graded, and what they say together."""
