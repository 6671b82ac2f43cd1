"""Measuring a head: real draft-and-verify decoding, and the report."""
