"""Many runs as one program: the members of a population, trained side by side and kept as runs of their own."""
