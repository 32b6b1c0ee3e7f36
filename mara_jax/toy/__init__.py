"""The 100-outcome problem: one run, a sweep of many, a phase diagram."""
