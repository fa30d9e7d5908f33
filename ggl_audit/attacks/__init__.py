"""The attacks of an audit, one a file, and which of them are made."""
