"""Phantom wounds: photographs whose truth is known, rendered where the hospital's cannot ship."""
