"""Generators: families (build), checkpoints (resolve, describe, save) and safe loading."""
