"""Everything that comes from outside is read, checked and named here, and nowhere else."""
