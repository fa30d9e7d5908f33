"""What a grade rests on: identification, fidelity, controls, bounds, and the grade itself."""
