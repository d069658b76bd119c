"""Ranks, groups and collectives: from a launcher's environment to an all-reduce."""
