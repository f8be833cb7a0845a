"""Offline builder of synthetic, phase-labelled wound crops: plan, sample, score, shard, filter, mix."""

__version__ = "0.1.0"
