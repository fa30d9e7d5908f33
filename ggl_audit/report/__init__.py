"""The result of an audit, and one renderer a file."""
