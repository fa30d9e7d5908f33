"""The experiments of an audit, each of which adds to what has been measured."""
