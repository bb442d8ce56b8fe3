"""The linear program of routing."""
