"""What each rank will own, what it will cost, before a weight is read."""
