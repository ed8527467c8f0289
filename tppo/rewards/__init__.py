"""What grades finished responses."""
