"""The theory laboratory: exact optima, the paper's figures, audits and predictions, as pure computations."""
