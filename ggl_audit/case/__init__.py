"""What an audit works on, loaded once and checked against each other."""
