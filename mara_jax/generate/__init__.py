"""Completions of prompts: drawn, grouped by answer, counted."""
