"""What commands show: text, progress, failures, pictures."""
