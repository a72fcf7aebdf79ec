"""Terminal output of commands: text, progress, failures, pictures."""
