"""Where the optimum of a configuration lies, before it is trained."""
