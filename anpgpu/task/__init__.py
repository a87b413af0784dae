"""What was asked: the problem and its loss."""
