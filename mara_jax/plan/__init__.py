"""Whether a run fits devices that one does not have yet, and what it costs there."""
