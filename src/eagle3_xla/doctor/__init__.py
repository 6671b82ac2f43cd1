"""Reads a head, ours or anyone's, as the engines will, and says what they would make of it."""
