"""What other people's training loops call around a split model: each call is exact, or raises before it changes anything."""
