"""The caller's problem in canonical form, and its loss."""
