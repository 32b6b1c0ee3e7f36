"""The didactic figures of the papers."""
