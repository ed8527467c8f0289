"""Policies and value models: where they come from, what is put into them, what they need."""
