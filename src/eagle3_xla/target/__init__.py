"""The frozen target: loading, aux hidden states, teacher distributions."""
