"""Scores of an image: what they are measured against, and the limits that real crops set."""
