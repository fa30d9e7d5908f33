"""The client's side: what it computes from its images, and what it records of that."""
