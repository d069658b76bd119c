"""What a user starts: generate, verify, plan, shard; what the commands have in common."""
